"""What this host's processor can do, as far as machine code depends on it.

Comes from /proc/cpuinfo; on a system without it the features are unknown and the set is empty.
"""

import functools
import platform
import re
from pathlib import Path

# Flags of x86 that name instructions a compiler may emit. On Arm every feature in /proc/cpuinfo is of that kind.
_X86_INSTRUCTIONS = re.compile(
    r"sse\d?\w*|ssse3|avx\w*|fma4?|f16c|bmi[12]|amx_\w+|v?aes|v?pclmulqdq|popcnt|abm|movbe|adx|sha_ni|sha512|gfni|xop|tbm|cx16"
)


@functools.cache
def machine() -> str:
    """The architecture's name, "x86_64" or "aarch64"."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


@functools.cache
def cpu_model() -> str:
    """The processor's name for people, or "unknown"."""
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction sets of this host, named as in /proc/cpuinfo."""
    return parse_features(_cpuinfo())


def parse_features(cpuinfo: dict[str, str]) -> frozenset[str]:
    """The instruction sets among the flags of one processor of /proc/cpuinfo."""
    if "Features" in cpuinfo:
        return frozenset(cpuinfo["Features"].split())
    return frozenset(flag for flag in cpuinfo.get("flags", "").split() if _X86_INSTRUCTIONS.fullmatch(flag))


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The fields of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _cpuinfo() -> dict[str, str]:
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        return {}


def features_up_to(features: frozenset[str], max_isa: str | None) -> frozenset[str]:
    """The features that code may use when XLA_FLAGS holds `--xla_cpu_max_isa=max_isa` (None: all of them)."""
    excluded: tuple[str, ...] = ()
    for isa, next_features in reversed(_ISA_LADDER):
        excluded += next_features
        if isa == (max_isa or "").upper():
            return frozenset(feature for feature in features if not feature.startswith(excluded))
    return features


# Each instruction set that --xla_cpu_max_isa knows, with what comes only above it.
_ISA_LADDER = (
    ("SSE4_2", ("avx", "f16c", "vaes", "vpclmulqdq")),
    ("AVX", ("avx2", "fma", "avx_vnni", "avx_ifma", "avx_ne_convert")),
    ("AVX2", ("avx512", "avx10")),
    ("AVX512", ("avx512_vnni", "avx_vnni")),
    ("AVX512_VNNI", ("avx512_bf16",)),
    ("AVX512_BF16", ("amx", "avx512_fp16")),
    ("AMX", ("amx_fp16",)),
)
