"""Builds the native kernels where a C++ compiler is present; everything else stands in pyproject.toml.

kernels/native/kernels.cpp is compiled once for each instruction set, with its flags; the library chooses among them
at run time. With a compiler that does not know AMX (GCC before 11) or Arm's bfloat16 (GCC before 10) that set is left
out. Without a compiler, or with ICEFORMER_BUILD_KERNELS=0, the package is installed without the library and runs in
pure XLA.

The library is not a Python extension: one wheel is for every version of Python. CXX may be a cross compiler if
_PYTHON_HOST_PLATFORM names what it compiles for, e.g. linux-aarch64.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

import jaxlib
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

NATIVE = Path("kernels", "native")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
AVX512_BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
# Of each architecture, worst first. common/dispatch.cpp knows by these names which of them a processor has.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DICEFORMER_TILES"],
    },
    "aarch64": {
        "neon": [],
        "neon_dotprod": ["-march=armv8.2-a+dotprod"],
        "neon_bf16": ["-march=armv8.2-a+dotprod+bf16+i8mm"],
    },
}
ELSEWHERE: dict[str, list[str]] = {"baseline": []}
# Programs that compilers take only if they know an instruction set that not all of them do.
PROBES = {
    "amx": """
#include <immintrin.h>
void probe(const void *configuration) {
  _tile_loadconfig(configuration);
  _tile_dpbf16ps(0, 1, 2);
  _tile_dpbssd(0, 1, 2);
}
""",
    "neon_bf16": """
#include <arm_neon.h>
float32x4_t probe(float32x4_t sum, bfloat16x8_t a) { return vbfdotq_f32(sum, a, a); }
int32x4_t probe(int32x4_t sum, int8x16_t a) { return vmmlaq_s32(sum, a, a); }
""",
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", *os.environ.get("ICEFORMER_CXXFLAGS", "").split()]


def architecture() -> str:
    """What the library is built for, "x86_64", "aarch64" or another."""
    name = sysconfig.get_platform().rpartition("-")[2]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def sources_version() -> str:
    """A version that changes with every change of the sources and of how they are built."""
    digest = hashlib.sha256()
    for file in sorted([*NATIVE.rglob("*.cpp"), *NATIVE.rglob("*.h"), Path("setup.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set; a failure leaves the library out."""

    def run(self) -> None:
        # A library of an earlier build must not be installed with these sources.
        for extension in self.extensions:
            Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        try:
            if os.environ.get("ICEFORMER_BUILD_KERNELS", "1") == "0":
                raise PlatformError("ICEFORMER_BUILD_KERNELS is 0")
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            self.warn(f"the native kernels are left out, attention will run in pure XLA: {error}")

    def build_extension(self, extension: Extension) -> None:
        known = INSTRUCTION_SETS.get(architecture(), ELSEWHERE)
        sets = {name: flags for name, flags in known.items() if name not in PROBES or self.takes(name, flags)}
        macros: list[tuple[str, str | None]] = [("ICEFORMER_VERSION", f'"{sources_version()}"')]
        macros += [("ICEFORMER_INSTRUCTION_SETS", " ".join(f"X({name})" for name in reversed(sets)))]
        include = ["-isystem", str(Path(jaxlib.__file__).parent / "include")]
        output = Path(self.build_temp)
        objects = self.compiler.compile(
            [str(source) for source in sorted(NATIVE.glob("*/*.cpp"))],
            output_dir=str(output),
            macros=macros,
            include_dirs=[str(NATIVE)],
            extra_postargs=[*FLAGS, *include],
        )
        for name, flags in sets.items():
            objects += self.compiler.compile(
                [str(NATIVE / "kernels.cpp")],
                output_dir=str(output / name),
                macros=[*macros, ("ICEFORMER_ISA", name)],
                include_dirs=[str(NATIVE)],
                extra_postargs=[*FLAGS, *flags],
            )
        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, target_lang="c++")

    def takes(self, name: str, flags: list[str]) -> bool:
        """Whether compiler and assembler know an instruction set."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{name}_probe.cpp"
        probe.write_text(PROBES[name])
        try:
            self.compiler.compile([str(probe)], output_dir=str(folder), extra_postargs=flags)
        except CCompilerError as error:
            self.warn(f"the kernels for {name} are left out, the compiler does not know it: {error}")
            return False
        return True

    def get_ext_filename(self, fullname: str) -> str:
        # Loaded by ctypes, not imported: the name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"


class Wheel(bdist_wheel):
    """A wheel for a platform, and for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("iceformer.kernels.native.libiceformer", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
