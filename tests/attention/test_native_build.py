"""How the native kernels are built: no instruction leaks to processors without it, sanitizers find nothing, and a wheel
has all of the package."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from iceformer import kernels

ROOT = Path(__file__).parents[2]
WIDE = re.compile(r"^v[a-z]|%[yz]mm|%k[0-7]")
"""An AVX or AVX-512 instruction, as objdump writes it."""

needs_binutils = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump") or not shutil.which("nm"),
    reason="needs x86-64 and binutils",
)
needs_sanitizers = pytest.mark.skipif(
    not shutil.which("g++")
    or any(
        not Path(subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()).is_absolute()
        for name in ("libasan.so", "libubsan.so")
    ),
    reason="needs g++ and its sanitizers",
)


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """What is built does not depend on the form that attention takes."""


def build(folder: Path, **environment: str) -> str:
    """Builds the library into a folder, its objects into `objects`, and gives what was printed."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, of the test extra")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def wide_functions(file: Path) -> Iterator[str]:
    """Mangled names of the functions of an object or a library that hold an AVX instruction."""
    name, found = "", False
    for line in subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", file], text=True).splitlines():
        if start := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            name, found = start[1], False
        elif not found and (instruction := re.match(r"^ +[0-9a-f]+:\t(.*)$", line)) and WIDE.search(instruction[1]):
            found = True
            yield name


@needs_binutils
def test_wide_instructions_are_in_the_functions_of_their_instruction_set_only() -> None:
    if not kernels.register() or os.environ.get("ICEFORMER_KERNELS", "1") != "1":
        pytest.skip("the native kernels are not built")
    functions = set(wide_functions(kernels._LIBRARY))
    assert any("9iceformer4avx2" in name for name in functions)
    assert {
        name for name in functions if not re.search(r"9iceformer(4avx2|6avx512|11avx512_bf16|3amx)\d", name)
    } == set()


@pytest.mark.native
@needs_binutils
def test_no_object_offers_the_linker_a_function_that_another_instruction_set_could_get(tmp_path: Path) -> None:
    # Nothing is inlined that need not be, so that every function that could be offered is.
    build(tmp_path, ICEFORMER_CXXFLAGS="-O0", CXX="g++")
    objects = {
        file.relative_to(tmp_path / "objects").parts[0]: file for file in (tmp_path / "objects").rglob("kernels.o")
    }
    assert set(objects) - {"amx"} == {"baseline", "avx2", "avx512", "avx512_bf16"}, "amx needs a recent compiler"
    for name, file in objects.items():
        symbols = subprocess.check_output(["nm", "--format=posix", file], text=True).splitlines()
        weak = {line.split()[0] for line in symbols if line.split()[1] in "WVu"}
        weak = {symbol for symbol in weak if not symbol.startswith("DW.ref.")}  # A pointer, not code.
        assert weak
        assert {symbol for symbol in weak if not re.match(rf"_ZZ?NK?9iceformer{len(name)}{name}\d", symbol)} == set(), (
            name
        )
    for file in [*(tmp_path / "objects" / "kernels").rglob("*.o"), objects["baseline"]]:
        assert list(wide_functions(file)) == [], file


@pytest.mark.parametrize("environment", [{"CXX": "/bin/false"}, {"ICEFORMER_BUILD_KERNELS": "0"}])
def test_without_a_compiler_the_library_is_left_out(tmp_path: Path, environment: dict[str, str]) -> None:
    assert "the native kernels are left out, attention will run in pure XLA: " in build(tmp_path, **environment)
    assert not list(tmp_path.rglob("*.so"))


def sanitized(*arguments: str, examples: int) -> None:
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "sanitize.sh", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"PYTHON": sys.executable, "ICEFORMER_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.native
@needs_sanitizers
def test_sanitizers_find_nothing_in_some_cases() -> None:
    cases = "library_is or log_sum or (bfloat16 and odd) or (large and blocks) or refused or (float64 and 33)"
    cases += " or rounded_rows"
    sanitized("-k", cases, examples=2)


@pytest.mark.slow
@needs_sanitizers
def test_sanitizers_find_nothing() -> None:
    sanitized(examples=10)


def package_files() -> Iterator[Path]:
    """What this checkout would install besides the library, through the package's links to folders."""
    for folder, _, names in os.walk(ROOT / "iceformer", followlinks=True):
        for file in (Path(folder, name) for name in names):
            if file.suffix not in (".so", ".cpp", ".h", ".pyc"):
                yield file


@pytest.mark.native
def test_a_wheel_from_the_source_archive_has_the_library_that_was_built_with_it(tmp_path: Path) -> None:
    def make(kind: str, folder: Path, **environment: str) -> Path:
        code = f"import sys; from setuptools import build_meta as backend; backend.build_{kind}(sys.argv[1])"
        target = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        subprocess.run([sys.executable, "-c", code, target], cwd=folder, env=os.environ | environment, check=True)
        return next(target.iterdir())

    shutil.unpack_archive(make("sdist", ROOT), tmp_path / "source", filter="data")
    folder = next((tmp_path / "source").iterdir())
    library = "iceformer/kernels/native/libiceformer.so"
    assert not list(folder.rglob("*.so"))
    with zipfile.ZipFile(make("wheel", folder)) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist() if re.match(r"iceformer/.*[^/]$", name)}
        assert re.search(r"-py3-none-linux_\w+\.whl$", str(wheel.filename))
    assert files.pop(library)
    assert files == {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in package_files()}
    # In the same folder: what was built before stays out.
    with zipfile.ZipFile(make("wheel", folder, ICEFORMER_BUILD_KERNELS="0")) as wheel:
        assert "iceformer/kernels/__init__.py" in wheel.namelist()
        assert library not in wheel.namelist()
