"""What loading refuses, what it falls back from, and what a compile that fails leaves behind."""

import dataclasses
import itertools
import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import iceformer
from iceformer import kernels
from iceformer.deploy import artifact as layout
from iceformer.deploy import lowering
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.manifest import ArtifactError, Environment, parse_manifest
from iceformer.deploy.session import Session

from ..few import few
from .conftest import BUCKETS

ENTRIES = ("prefill", "decode", "check", "score")
FILES = (
    "README.md",
    "generation_config.json",
    "manifest.json",
    "manifest.sha256",
    "tokenizer.json",
    "weights.safetensors",
    *(f"native/{bucket}/{entry}.bin" for bucket in BUCKETS for entry in ENTRIES),
    *(f"portable/{bucket}/{entry}.stablehlo" for bucket in BUCKETS for entry in ENTRIES),
)


@pytest.fixture
def copy(exact_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exact_artifact, tmp_path / "artifact")


def change_environment(folder: Path, **fields: object) -> None:
    """Rewrites the manifest, with its hash, as if it had been compiled elsewhere."""
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    environment = dataclasses.replace(manifest.environment, **fields)  # pyright: ignore[reportArgumentType]
    layout.write_manifest(folder, dataclasses.replace(manifest, environment=environment))


def test_holds_exactly_these_files(exact_artifact: Path) -> None:
    found = {path.relative_to(exact_artifact).as_posix() for path in exact_artifact.rglob("*") if path.is_file()}
    assert found == set(FILES)


PLACES = (0.0, 0.5, 1.0)
"""Of a byte in a file."""


@pytest.mark.parametrize(
    ("name", "where"),
    few(itertools.product(FILES, PLACES), list(zip(FILES, itertools.cycle(PLACES), strict=False))),
)
def test_a_changed_byte_is_refused(copy: Path, name: str, where: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"(is not the file that was compiled|does not match).*compile it again"):
        iceformer.load(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"lacks {name}"):
        iceformer.load(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    path = copy / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is not the file"):
        iceformer.load(copy)


def test_a_swapped_pair_is_refused(copy: Path) -> None:
    """Entries of two buckets that change places keep every byte, but not under the name that the manifest gives."""
    small, large = copy / "native/64/score.bin", copy / "native/128/score.bin"
    kept = small.read_bytes()
    small.write_bytes(large.read_bytes())
    large.write_bytes(kept)
    with pytest.raises(ArtifactError, match=r"native/64/score\.bin is not the file"):
        iceformer.load(copy)


def test_other_files_are_ignored(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert iceformer.load(copy).tier == "native"


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an artifact written by `iceformer compile`"):
        iceformer.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"lacks manifest\.json: it is not an artifact"):
        iceformer.load(tmp_path)


def test_another_jaxlib_uses_the_portable_tier(copy: Path, exact_session: Session) -> None:
    """Machine code of another jaxlib is not touched, and the StableHLO gives the same numbers."""
    change_environment(copy, jaxlib="0.9.9")
    with pytest.warns(PortableTierWarning, match=r"compiled with jaxlib 0\.9\.9, but this is .* compiled instead"):
        session = iceformer.load(copy)
    assert session.tier == "portable"
    ids = np.arange(10, 60)
    portable, native = session.score(ids), exact_session.score(ids)
    np.testing.assert_allclose(portable.logprobs, native.logprobs, atol=1e-5)
    np.testing.assert_array_equal(portable.argmax, native.argmax)
    np.testing.assert_array_equal(session.generate(ids, 5).ids, exact_session.generate(ids, 5).ids)


def test_a_missing_cpu_feature_uses_the_portable_tier(copy: Path) -> None:
    change_environment(copy, cpu_features=("avx9000",))
    with pytest.warns(PortableTierWarning, match="needs the CPU features avx9000, which this CPU lacks"):
        assert iceformer.load(copy).tier == "portable"


@pytest.mark.parametrize(
    ("here", "tier", "reason"),
    [
        ("2", "native", None),
        ("3", "portable", "compiled with kernels 2, but this is 3"),
        (None, "portable", "compiled with kernels 2, which are not built here"),
        ("broken", "portable", "calls native kernels that this process cannot register"),
    ],
)
def test_kernels_are_registered_or_the_portable_tier_is_used(
    copy: Path, monkeypatch: pytest.MonkeyPatch, here: str | None, tier: str, reason: str | None
) -> None:
    calls = []
    monkeypatch.setattr(kernels, "version", lambda: "2" if here == "broken" else here)
    monkeypatch.setattr(kernels, "register", lambda: calls.append(1) or here == "2")
    change_environment(copy, kernels="2")
    with pytest.warns(PortableTierWarning, match=reason) if reason else nullcontext():
        assert iceformer.load(copy).tier == tier
    assert bool(calls) == (here in ("2", "broken"))


def test_machine_code_that_xla_refuses_uses_the_portable_tier(copy: Path) -> None:
    """All hashes fit, but the payload is a pickle of something else."""
    manifest = parse_manifest((copy / "manifest.json").read_bytes())
    bucket = manifest.buckets[0]
    payload = pickle.dumps("not an executable")
    native = layout.write_file(copy, bucket.entries["score"].native.path, payload)
    entries = bucket.entries | {"score": dataclasses.replace(bucket.entries["score"], native=native)}
    buckets = (dataclasses.replace(bucket, entries=entries), *manifest.buckets[1:])
    layout.write_manifest(copy, dataclasses.replace(manifest, buckets=buckets))
    with pytest.warns(PortableTierWarning, match=r"cannot load native/64/score\.bin"):
        assert iceformer.load(copy).tier == "portable"


def test_portable_code_that_cannot_be_read(copy: Path) -> None:
    manifest = parse_manifest((copy / "manifest.json").read_bytes())
    bucket = manifest.buckets[0]
    portable = layout.write_file(copy, bucket.entries["score"].portable.path, b"from the future")
    entries = bucket.entries | {"score": dataclasses.replace(bucket.entries["score"], portable=portable)}
    buckets = (dataclasses.replace(bucket, entries=entries), *manifest.buckets[1:])
    environment = dataclasses.replace(manifest.environment, jax="0.1")
    layout.write_manifest(copy, dataclasses.replace(manifest, buckets=buckets, environment=environment))
    with pytest.raises(ArtifactError, match=r"cannot read portable/64/score\.stablehlo .* compile the artifact again"):
        iceformer.load(copy)


HERE = Environment("0.10.2", "0.10.2", "3.11", "x86_64", "some CPU", ("avx", "avx2"), ("--xla_a=1",), "2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"cpu_model": "another CPU"}, None),
        ({"cpu_features": ("avx",)}, None),
        ({"jax": "0.10.1"}, "compiled with jax 0.10.1, but this is 0.10.2"),
        ({"jaxlib": "0.10.1"}, "compiled with jaxlib 0.10.1, but this is 0.10.2"),
        ({"python": "3.12"}, "compiled with Python 3.12, but this is 3.11"),
        ({"machine": "aarch64", "cpu_features": ("sve",)}, "compiled with machine aarch64, but this is x86_64"),
        (
            {"cpu_features": ("amx_bf16", "avx", "avx512f")},
            "needs the CPU features amx_bf16 avx512f, which this CPU lacks",
        ),
        ({"kernels": ""}, None),
        ({"kernels": "1"}, "compiled with kernels 1, but this is 2"),
        ({"xla_flags": ()}, "compiled with XLA_FLAGS (none), but this is --xla_a=1"),
    ],
)
def test_differences(fields: dict, message: str | None) -> None:
    found = layout.differences(dataclasses.replace(HERE, **fields), HERE)
    assert found == ([message] if message else [])


def test_kernels_that_are_not_built_here() -> None:
    found = layout.differences(HERE, dataclasses.replace(HERE, kernels=""))
    assert found == ["compiled with kernels 2, which are not built here"]


def test_flags_without_effect_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to='/tmp/a b' --xla_cpu_max_isa=AVX2 --xla_z=1 --xla_cpu_use_x=false")
    assert layout.host_environment().xla_flags == ("--xla_cpu_use_x=false", "--xla_z=1")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_failed_compile_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(lowering, "check_custom_calls", fail)
    with pytest.raises(failure):
        iceformer.compile(checkpoint, tmp_path / "artifact", buckets=(32,), attention=iceformer.Exact(), chunk=32)
    assert list(tmp_path.iterdir()) == []


def test_manifest_says_what_was_compiled(exact_session: Session, checkpoint: Path) -> None:
    info = exact_session.info
    assert [bucket.capacity for bucket in info.buckets] == list(BUCKETS)
    assert [info.buckets[0].plan[call]["kind"] for call in ("prompt", "decode")] == ["exact", "exact"]
    assert info.buckets[0].plan_reason == "as asked"
    assert info.crossover == ()
    assert info.environment.kernels == (kernels.version() or "")
    assert (info.dtype, info.batch) == ("float32", 1)
    assert info.model.config == json.loads((checkpoint / "config.json").read_text())
    assert info.model.eos_token_ids == (2, 3)
    assert info.provenance.source == json.loads((checkpoint / "iceformer.json").read_text())
    assert info.provenance.calibration is None
    score = info.buckets[0].entries["score"]
    assert list(score.arguments) == ["tokens", "targets", "slot", "offset", "length"]
    assert score.results["logprobs"].shape == (1, 32)
    assert sum(score.attention.values()) == info.model.config["num_hidden_layers"]
    assert score.memory.temp_bytes > 0
    assert score.compile_seconds > 0
    assert parse_manifest(info.to_json()) == info
