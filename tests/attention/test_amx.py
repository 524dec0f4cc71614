"""The kernels for AMX against the XLA form, on processors that have none: with tiles emulated in C++ ("amx_emulated"),
and as real machine code ("amx") whose tile instructions are caught one by one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from iceformer import kernels

ROOT = Path(__file__).resolve().parents[2]
NATIVE, HERE = ROOT / "kernels" / "native", Path(__file__).parent
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"]
VECTORS = [*AVX512, "-mavx2", "-mfma"]
TILES = ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
SETS = ["-DICEFORMER_INSTRUCTION_SETS=X(amx) X(baseline) X(amx_emulated)"]
HEADERS = ["-isystem", str(Path(jaxlib.__file__).parent / "include")]
# Object: source and flags. trap.cpp stands in for amx.cpp.
OBJECTS = {
    "ffi": (NATIVE / "attention" / "ffi.cpp", HEADERS),
    "linear_ffi": (NATIVE / "linear" / "ffi.cpp", HEADERS),
    "amx": (NATIVE / "kernels.cpp", [*VECTORS, *TILES, "-DICEFORMER_TILES", "-DICEFORMER_ISA=amx"]),
    "amx_emulated": (
        NATIVE / "kernels.cpp",
        [*VECTORS, "-DICEFORMER_ISA=amx_emulated", "-DICEFORMER_EMULATE_AMX"],
    ),
    "baseline": (NATIVE / "kernels.cpp", ["-DICEFORMER_ISA=baseline"]),
    "trap": (HERE / "amx" / "trap.cpp", VECTORS),
    "dispatch": (NATIVE / "common" / "dispatch.cpp", SETS),
    "select": (NATIVE / "attention" / "select.cpp", []),
}


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """The kernels alone are tested here."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with both sets; skips where it cannot be built or run."""
    compiler = shutil.which("g++")
    if compiler is None or "avx512_bf16" not in kernels.instruction_sets():
        pytest.skip("needs g++ and a processor with AVX-512 and bfloat16")
    if "amx" in kernels.instruction_sets():
        pytest.skip("this processor has AMX: test_custom_calls.py tests it")
    folder = tmp_path_factory.mktemp("amx")
    if subprocess.run([compiler, *TILES, "-E", "-x", "c++", "-"], input=b"", capture_output=True).returncode:
        pytest.skip("g++ does not know AMX")
    common = [compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{NATIVE}", f"-I{HERE / 'amx'}"]
    running = [
        subprocess.Popen([*common, *flags, "-c", str(source), "-o", str(folder / f"{name}.o")])
        for name, (source, flags) in OBJECTS.items()
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    built = folder / "libiceformer.so"
    subprocess.run([compiler, "-shared", *map(str, folder.glob("*.o")), "-o", str(built)], check=True)
    return built


def run(library: Path, instruction_set: str, *command: str) -> str:
    environment = {**os.environ, "ICEFORMER_KERNELS": str(library), "ICEFORMER_ISA": instruction_set}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.native
def test_tiles_agree_with_xla(library: Path) -> None:
    names = run(library, "amx_emulated", "-c", "from iceformer import kernels; print(*kernels.instruction_sets())")
    assert names.split() == ["amx", "baseline", "amx_emulated"]
    # That module runs each of its cases with every instruction set of the library.
    cases = "agrees and (bfloat16 or two and (odd or blocks or directions))"
    report = run(
        library, "amx_emulated", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler",
        str(HERE / "test_custom_calls.py"), "-k", cases,
    )  # fmt: skip
    assert re.search(r"^\d\d passed, \d+ deselected in", report, re.MULTILINE), report


@pytest.mark.native
def test_tiles_multiply_by_weights(library: Path) -> None:
    """Every case runs in XLA and with the library's three instruction sets."""
    modules = [str(HERE.parent / "model" / name) for name in ("test_products.py", "test_activations.py")]
    report = run(
        library, "amx_emulated", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler",
        *modules, "-k", "(float64 and (9 or 33)) or rounded_rows or largest",
    )  # fmt: skip
    assert re.search(r"^\d+ passed, \d+ deselected in", report, re.MULTILINE), report
