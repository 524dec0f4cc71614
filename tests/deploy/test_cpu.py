"""CPU features from texts of /proc/cpuinfo, as Linux writes them on three machines."""

import pytest

from iceformer.deploy.cpu import cpu_features, features_up_to, machine, parse_cpuinfo, parse_features

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu vme sse sse2 ht syscall nx lm pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx \
f16c rdrand hypervisor abm bmi1 hle avx2 smep bmi2 erms avx512f avx512dq adx avx512_bf16 avx512_vnni avx_vnni \
gfni vaes amx_bf16 amx_tile amx_int8 md_clear
bogomips\t: 5399.99

processor\t: 1
flags\t\t: none
"""
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes sve asimddp i8mm bf16\nCPU part\t: 0xd40\n"


def test_x86_keeps_instruction_sets_only() -> None:
    features = parse_features(parse_cpuinfo(XEON))
    assert {"avx2", "fma", "avx512_bf16", "amx_tile", "sse4_2", "popcnt"} <= features
    assert not {"fpu", "nx", "hypervisor", "md_clear", "xsave", "smep"} & features


def test_arm_features() -> None:
    assert parse_features(parse_cpuinfo(GRAVITON)) >= {"asimd", "sve", "bf16"}


def test_text_without_flags() -> None:
    assert parse_features(parse_cpuinfo("")) == frozenset()


@pytest.mark.parametrize(
    ("isa", "kept", "gone"),
    [
        (None, {"amx_bf16", "avx512f", "avx2"}, set()),
        ("AVX2", {"avx2", "fma", "avx"}, {"avx512f", "avx512_bf16", "avx_vnni", "amx_tile"}),
        ("avx512", {"avx512f", "avx2"}, {"avx512_vnni", "avx512_bf16", "amx_tile"}),
        ("SSE4_2", {"sse4_2", "popcnt"}, {"avx", "avx2", "fma", "f16c", "avx512f"}),
    ],
)
def test_max_isa_limits_the_features(isa: str | None, kept: set[str], gone: set[str]) -> None:
    features = features_up_to(parse_features(parse_cpuinfo(XEON)), isa)
    assert kept <= features
    assert not gone & features


def test_this_host() -> None:
    assert machine()
    assert all(feature == feature.strip() for feature in cpu_features())
