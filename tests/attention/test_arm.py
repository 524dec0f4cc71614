"""The kernels for Arm against the XLA form, on an emulated processor.

XLA runs here and hands each custom call, through a pipe, to a process under qemu that runs the kernels (arm/).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from .test_native_build import build

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CROSS = "aarch64-linux-gnu-"
SETS = ("neon_bf16", "neon_dotprod", "neon")
LATER = re.compile(r"\t([su]dot|usdot|sudot|bf\w+|[su]mmla|usmmla)\t")
"""An instruction that comes after Armv8.0, as objdump writes it."""
FLAGS = ["-std=c++17", "-O1", "-isystem", str(Path(jaxlib.__file__).parent / "include")]


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """The kernels alone are tested here."""


@pytest.fixture(scope="module")
def compiler() -> str:
    """The cross compiler, with its binutils."""
    if platform.machine() == "aarch64":
        pytest.skip("this processor is an Arm: test_custom_calls.py tests its kernels")
    names = [CROSS + name for name in ("g++", "objdump", "nm")]
    if missing := [name for name in names if not shutil.which(name)]:
        pytest.skip(f"needs a cross compiler, and there is no {missing[0]} (Debian's g++-aarch64-linux-gnu)")
    return names[0]


@pytest.fixture(scope="module")
def built(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build for Arm."""
    folder = tmp_path_factory.mktemp("arm")
    build(folder, CXX=compiler, _PYTHON_HOST_PLATFORM="linux-aarch64", ICEFORMER_CXXFLAGS="")
    return folder


def library_of(built: Path) -> Path:
    return built / "iceformer" / "kernels" / "native" / "libiceformer.so"


@pytest.fixture(scope="module")
def back(compiler: str, built: Path) -> str:
    """The command that runs the kernels on an emulated processor, less the library and the processor's name."""
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs qemu-aarch64 (Debian's qemu-user)")
    program = built / "back"
    subprocess.run([compiler, *FLAGS, str(HERE / "arm" / "back.cpp"), "-o", str(program)], check=True)
    found = subprocess.check_output([compiler, "-print-file-name=libstdc++.so.6"], text=True).strip()
    root = Path(found).resolve().parents[1]
    return f"qemu-aarch64 -L {root} -cpu {{}} {program} {library_of(built)}"


@pytest.fixture(scope="module")
def front(built: Path) -> Path:
    """What XLA loads."""
    host = shutil.which("g++")
    if host is None:
        pytest.skip("needs g++")
    library = built / "front.so"
    subprocess.run([host, *FLAGS, "-shared", "-fPIC", str(HERE / "arm" / "front.cpp"), "-o", str(library)], check=True)
    return library


def run(front: Path, back: str, *arguments: str) -> str:
    """What pytest reports of some tests of the custom calls, which run with every instruction set of the library."""
    environment = os.environ | {
        "ICEFORMER_KERNELS": str(front),
        "ICEFORMER_BRIDGE": back.format("max"),
        "ICEFORMER_EXAMPLES": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.native
@pytest.mark.parametrize(("processor", "sets"), [("cortex-a53", SETS[2:]), ("neoverse-n1", SETS[1:]), ("max", SETS)])
def test_a_processor_gets_the_instruction_sets_that_it_has(back: str, processor: str, sets: tuple[str, ...]) -> None:
    command = back.format(processor).split()
    assert tuple(subprocess.check_output([*command, "--sets"], text=True).split()) == sets


@pytest.mark.native
def test_attention_agrees_with_xla(front: Path, back: str) -> None:
    report = run(front, back, str(HERE / "test_custom_calls.py"))
    assert re.search(r"^\d+ passed", report, re.MULTILINE), report


@pytest.mark.native
def test_linear_layers_agree_with_xla(front: Path, back: str) -> None:
    modules = [str(HERE.parent / "model" / name) for name in ("test_products.py", "test_activations.py")]
    report = run(front, back, *modules)
    assert re.search(r"^\d+ passed", report, re.MULTILINE), report


@pytest.mark.native
def test_later_instructions_are_in_the_functions_of_their_instruction_set_only(built: Path) -> None:
    listing = subprocess.check_output([CROSS + "objdump", "-d", "--no-show-raw-insn", library_of(built)], text=True)
    owner, found = "", set()
    for line in listing.splitlines():
        if start := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            names = re.search(r"9iceformer\d+(neon|neon_dotprod|neon_bf16)\d+[A-Za-z]", start[1])
            owner = names[1] if names else start[1]
        elif instruction := LATER.search(line):
            found.add((owner, instruction[1]))
    assert {owner for owner, _ in found} == {"neon_dotprod", "neon_bf16"}
    assert {name for owner, name in found if owner == "neon_dotprod"} == {"sdot"}
    assert {name for owner, name in found if owner == "neon_bf16"} >= {"sdot", "bfdot", "smmla"}


@pytest.mark.native
def test_no_object_offers_the_linker_a_function_that_another_instruction_set_could_get(
    compiler: str, tmp_path: Path
) -> None:
    # Nothing is inlined that need not be, so that every function that could be offered is.
    build(tmp_path, CXX=compiler, _PYTHON_HOST_PLATFORM="linux-aarch64", ICEFORMER_CXXFLAGS="-O0")
    for name in SETS:
        (file,) = (tmp_path / "objects" / name).rglob("kernels.o")
        symbols = subprocess.check_output([CROSS + "nm", "--format=posix", file], text=True).splitlines()
        weak = {line.split()[0] for line in symbols if line.split()[1] in "WVu"}
        weak = {symbol for symbol in weak if not symbol.startswith("DW.ref.")}  # A pointer, not code.
        assert weak
        assert {symbol for symbol in weak if not re.match(rf"_ZZ?NK?9iceformer{len(name)}{name}\d", symbol)} == set()
