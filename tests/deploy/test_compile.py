"""Options of compile that are refused early, what it is calibrated on, and bfloat16."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import iceformer
from iceformer import kernels
from iceformer.attention import METHODS, LowRank, make_method
from iceformer.deploy.calibration import calibration_ids
from iceformer.deploy.compile import check_options, default_buckets
from iceformer.deploy.entries import score_block
from iceformer.deploy.lowering import check_custom_calls, portable_code
from iceformer.deploy.session import Session
from iceformer.deploy.tables import describe_plan
from iceformer.model.registry import build

from ..few import few
from .conftest import TEXT, VOCABULARY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": (1024,)}, "bucket 1024 is longer than the 512 positions .* choose buckets up to 512"),
        ({"buckets": (128, 64)}, r"buckets are \(128, 64\), expected ascending"),
        ({"buckets": (64, 64)}, r"buckets are \(64, 64\), expected ascending"),
        ({"buckets": ()}, r"buckets are \(\), expected ascending"),
        ({"buckets": (0, 64)}, "expected ascending"),
        ({"buckets": (64, 100)}, "bucket 100 is not a multiple of chunk 32"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of: float32, bfloat16"),
        ({"weights": "int3"}, "weights is 'int3', expected one of: same, bfloat16, int8, int4"),
        ({"batch": 0}, "batch is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"calibration": [VOCABULARY]}, f"expected ids from 0 to {VOCABULARY - 1}"),
    ],
)
def test_refuses_options(checkpoint: Path, tmp_path: Path, options: dict, message: str) -> None:
    attention = iceformer.TwoStage(budget=32, query_block=8, key_block=2, sink=4, local=4)
    options = {"buckets": (64,), "chunk": 32, "attention": attention, **options}
    with pytest.raises(ValueError, match=message):
        iceformer.compile(checkpoint, tmp_path / "artifact", **options)
    assert not (tmp_path / "artifact").exists()


def test_refuses_an_existing_target_first(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        iceformer.compile(tmp_path / "nowhere", tmp_path)


def test_refuses_other_folders(tmp_path: Path, source: tuple[Path, object]) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder: expected a checkpoint"):
        iceformer.compile(tmp_path / "nowhere", tmp_path / "artifact")
    with pytest.raises(FileNotFoundError, match=r"lacks iceformer\.json.*iceformer convert"):
        iceformer.compile(source[0], tmp_path / "artifact")


@pytest.mark.parametrize("name", few(sorted(METHODS), ["product_quant"]))
def test_every_method_is_compiled(checkpoint: Path, tmp_path: Path, name: str) -> None:
    options = {"antidiagonal": {"stride": 4}, "product_quant": {"parts": 4, "bits": 4}, "lsh": {"tables": 8}}
    method = make_method(name, **options.get(name, {}))
    attention = iceformer.TwoStage(method, budget=32, query_block=8, key_block=4, sink=4, local=4, candidates=1.0)
    ids = np.random.default_rng(0).integers(4, VOCABULARY, 64)
    path = iceformer.compile(checkpoint, tmp_path / "a", buckets=(64,), chunk=32, attention=attention, calibration=ids)
    session = iceformer.load(path)
    logits = iceformer.load_model(checkpoint)(jnp.asarray(ids[None]))[0]
    exact = np.asarray(jax.nn.log_softmax(logits))[np.arange(63), ids[1:]]
    scores = session.score(ids).logprobs
    # The first see no more than the budget, the last are the exact last block.
    np.testing.assert_allclose(scores[:32], exact[:32], atol=1e-4)
    assert not np.allclose(scores[32:55], exact[32:55], atol=1e-5)
    assert np.abs(scores - exact).max() < 2
    assert len(session.generate(ids[:40], max_new_tokens=3).ids) == 3


def test_bfloat16_with_a_calibrated_method(checkpoint: Path, tmp_path: Path) -> None:
    """Weights take half the bytes; scores stay near float32's; the manifest says what the bases come from."""
    ids = np.random.default_rng(0).integers(4, VOCABULARY, 64)
    attention = iceformer.TwoStage(method=LowRank(rank=4), budget=32, query_block=8, key_block=2, sink=4, local=4)
    path = iceformer.compile(
        checkpoint, tmp_path / "a", buckets=(64,), chunk=64, attention=attention, dtype="bfloat16", calibration=ids
    )
    session = iceformer.load(path)
    calibration = session.info.provenance.calibration
    assert calibration is not None
    assert (calibration.kind, calibration.tokens) == ("ids", 64)
    assert calibration.sha256 == hashlib.sha256(ids.astype(np.int32).tobytes()).hexdigest()
    bucket = session.info.buckets[0]
    assert bucket.plan["decode"] == {"kind": "exact", "query_block": 256, "key_block": 512}
    assert bucket.plan["prompt"]["method"] == {"name": "low_rank", "rank": 4, "query_share": 0.5}
    constants = [name for name in session.info.weights.tensors if name.startswith("attention.")]
    names = ("key_projection", "lost_mean", "query_projection")
    assert constants == [f"attention.{layer}.{name}" for layer in (0, 1) for name in names]
    found = {name: array.dtype for name, array in bucket.cache.layers[0].items()}
    assert found == {"key": "bfloat16", "value": "bfloat16", "projected_key": "int8"}
    assert bucket.cache.size_in_bytes == 2 * (2 * 2 * 64 * 16 * 2 + 2 * 64 * 4)
    assert session.info.weights.file.size < 0.6 * 4 * session.info.model.parameters
    prompt = ids[:30]
    model = iceformer.load_model(checkpoint)
    exact = np.array(jax.jit(lambda tokens: model(tokens))(jnp.asarray(prompt[None])))[0]
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(session.score(prompt).logprobs, exact[np.arange(29), prompt[1:]], atol=0.2)


@pytest.mark.slow
def test_decoding_by_the_method_of_the_prompt(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One index and one calibration serve both, and the artifact tells of both."""
    calibrated: list[LowRank] = []
    learn = LowRank.calibrate

    def counted(self: LowRank, *arrays: Any) -> Any:
        calibrated.append(self)
        return learn(self, *arrays)

    monkeypatch.setattr(LowRank, "calibrate", counted)
    method = LowRank(rank=4)
    small: dict[str, Any] = {"sink": 4, "local": 4, "key_block": 2}
    prompt = iceformer.TwoStage(method, budget=32, query_block=8, **small)
    plan = iceformer.Plan(prompt, iceformer.DecodeSelection(method, budget=16, **small))
    path = iceformer.compile(checkpoint, tmp_path / "a", buckets=(64,), chunk=64, attention=plan)
    assert len(calibrated) == 2, "once for each layer"
    session = iceformer.load(path)
    bucket = session.info.buckets[0]
    assert describe_plan(bucket.plan).endswith(
        "; of new tokens decode-selection, low_rank: budget 16, mass 0.0, key_block 2, sink 4, local 4, "
        "exact_layers 1, crossover 0, sample 0, reallocate False, refresh 1, rank 4, query_share 1.0"
    )
    assert bucket.cache.layers[0].keys() == {"key", "value", "projected_key"}
    ids = list(range(4, 44))
    generation = session.generate(ids, max_new_tokens=8)
    assert generation.ids.size == 8 or generation.finish_reason == "stop"


def test_unknown_custom_calls_fail() -> None:
    check_custom_calls("score", ("TopK", "iceformer_exact"))
    with pytest.raises(ValueError, match="score calls lapack_sgesdd_ffi, which another process may not have"):
        check_custom_calls("score", ("TopK", "lapack_sgesdd_ffi"))


def test_portable_code_is_traced_again_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that doubles wherever kernels are allowed, traced in that form first."""
    allowed = [True]

    @contextmanager
    def disabled() -> Iterator[None]:
        allowed[0] = False
        yield
        allowed[0] = True

    monkeypatch.setattr(kernels, "disabled", disabled)

    def function(weights: tuple[jax.Array, ...], cache: jax.Array) -> jax.Array:
        return cache * (2.0 if allowed[0] else 1.0)

    specs = ((), jax.ShapeDtypeStruct((3,), jnp.float32))
    lowered = jax.jit(function, donate_argnums=1).lower(*specs)
    np.testing.assert_array_equal(lowered.compile()((), jnp.ones(3)), 2.0)
    portable = export.deserialize(bytearray(portable_code(function, specs)))
    np.testing.assert_array_equal(portable.call((), jnp.ones(3)), 1.0)


@pytest.mark.parametrize(("chunk", "block"), [(2048, 256), (256, 256), (300, 150), (100, 100), (514, 2), (1, 1)])
def test_score_block_divides_the_chunk(chunk: int, block: int) -> None:
    assert score_block(chunk) == block


@pytest.mark.parametrize(
    ("positions", "chunk", "expected"),
    [
        (512, 2048, (512,)),
        (8192, 2048, (4096, 8192)),
        (5000, 2048, (4096,)),
        (3000, 2048, (2048,)),
        (131072, 2048, (4096, 16384)),
    ],
)
def test_default_buckets_end_where_the_model_does(positions: int, chunk: int, expected: tuple[int, ...]) -> None:
    _, config = build({"model_type": "llama", "max_position_embeddings": positions})
    assert default_buckets(config, chunk) == expected
    check_options(config, buckets=expected, dtype="float32", weights="same", kv_dtype="same", batch=1, chunk=chunk)


class TestCalibrationIds:
    def test_random_ids_without_tokenizer(self, tmp_path: Path) -> None:
        ids, info = calibration_ids(None, tmp_path / "tokenizer.json", 100, 300)
        again, _ = calibration_ids(None, tmp_path / "tokenizer.json", 100, 300)
        assert (info.kind, info.tokens) == ("random ids", 300)
        assert 0 <= ids.min() < ids.max() < 100
        np.testing.assert_array_equal(ids, again)

    def test_a_text_file(self, tmp_path: Path, checkpoint: Path) -> None:
        (tmp_path / "text").write_text(TEXT)
        ids, info = calibration_ids(tmp_path / "text", checkpoint / "tokenizer.json", VOCABULARY, 50)
        assert (info.kind, info.tokens, len(ids)) == ("text", 50, 50)
        assert info.sha256 == hashlib.sha256(ids.tobytes()).hexdigest()

    def test_at_most_4096(self, tmp_path: Path) -> None:
        assert len(calibration_ids(np.ones(9000, np.int64), tmp_path / "t", 2, 10**6)[0]) == 4096

    def test_refuses(self, tmp_path: Path, checkpoint: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is not a file: calibration takes a text file"):
            calibration_ids(tmp_path / "nowhere", checkpoint / "tokenizer.json", 10, 10)
        (tmp_path / "text").write_text(TEXT)
        with pytest.raises(ValueError, match="has no tokenizer for the calibration text"):
            calibration_ids(tmp_path / "text", tmp_path / "tokenizer.json", 10, 10)
        with pytest.raises(ValueError, match="at least one token id"):
            calibration_ids([], tmp_path / "tokenizer.json", 10, 10)


def test_an_artifact_compiled_with_a_compilation_cache_runs(
    checkpoint: Path, tmp_path: Path, exact_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executables that jax reads from its cache cannot be serialised: an equal one was stored there before."""
    assert jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    options: dict[str, Any] = {"buckets": (32,), "attention": iceformer.Exact(), "chunk": 32}
    with monkeypatch.context() as patch:
        patch.setattr("iceformer.deploy.lowering._without_compilation_cache", nullcontext)
        iceformer.compile(checkpoint, tmp_path / "first", **options)
    session = iceformer.load(iceformer.compile(checkpoint, tmp_path / "second", **options))
    assert session.tier == "native"
    np.testing.assert_allclose(session.score([5, 6, 7]).logprobs, exact_session.score([5, 6, 7]).logprobs, atol=1e-5)
