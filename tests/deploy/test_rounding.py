"""An artifact with int8 weights: it scores as the model with dequantised weights does, and reports what they cost."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from typer.testing import CliRunner

import iceformer
from iceformer import kernels
from iceformer.cli import app
from iceformer.deploy import artifact as layout
from iceformer.deploy.calibration import CalibrationInputs, calibration_ids
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.manifest import parse_manifest
from iceformer.deploy.quantization_error import quantization_error
from iceformer.deploy.session import Session
from iceformer.model.modules import Linear
from iceformer.model.panels import unpack
from iceformer.model.registry import build
from iceformer.model.rounding import round_weights

from ..conftest import TINY_LLAMA
from ..few import few
from .conftest import CHUNK, VOCABULARY

DENSE: dict[str, Any] = {"buckets": (128,), "attention": iceformer.Exact(), "chunk": CHUNK}
SMALL: dict[str, Any] = DENSE | {"buckets": (64,)}


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return iceformer.compile(checkpoint, tmp_path_factory.mktemp("int8") / "artifact", weights="int8", **DENSE)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)


@pytest.fixture(scope="module")
def dequantized(checkpoint: Path, artifact: Path) -> Any:
    """The float32 model with the artifact's rounded kernels multiplied out."""
    model = iceformer.load_model(checkpoint)
    tensors = load_file(artifact / "weights.safetensors")
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            name = ".".join(map(str, path))
            kernel, scale = jnp.asarray(tensors[f"{name}.kernel"]), tensors.get(f"{name}.scale")
            if scale is not None:
                features, outputs = node.kernel.shape
                kernel = unpack(kernel, features)[:, :outputs] * np.repeat(scale, features // len(scale), axis=0)
            node.kernel[...] = kernel.astype(jnp.float32)
    return model


def logprobs_of(model: Any, ids: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jax.jit(lambda tokens: model(tokens))(jnp.asarray(ids[None]))[0]))


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length)


def check_scores(session: Session, model: Any, ids: np.ndarray, atol: float) -> None:
    expected = logprobs_of(model, ids)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(session.score(ids).logprobs, expected, atol=atol)


@pytest.mark.parametrize("length", [2, 33, 128])
def test_scores_are_those_of_the_dequantised_model(session: Session, dequantized: Any, length: int) -> None:
    check_scores(session, dequantized, random_ids(length), atol=1e-4)


def test_scores_are_near_to_those_of_the_float_model(session: Session, exact_session: Session) -> None:
    ids = random_ids(128)
    difference = np.abs(session.score(ids).logprobs - exact_session.score(ids).logprobs)
    assert 1e-3 < difference.max() < 0.5
    assert difference.mean() < 0.1


def test_greedy_ids_are_those_of_the_dequantised_model(session: Session, dequantized: Any) -> None:
    ids = random_ids(40)
    expected = ids.tolist()
    forward = jax.jit(lambda tokens, lengths: dequantized(tokens, lengths))
    for _ in range(8):
        logits = forward(np.pad(expected, (0, 64 - len(expected)))[None], np.array([len(expected)], np.int32))
        expected.append(int(logits[0, len(expected) - 1].argmax()))
    assert session.generate(ids, max_new_tokens=8).ids.tolist() == expected[40:]


def test_the_portable_tier_scores_alike(artifact: Path, dequantized: Any, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    manifest = parse_manifest((artifact / layout.MANIFEST).read_bytes())
    elsewhere = dataclasses.replace(manifest.environment, jaxlib="0.9.9")
    layout.write_manifest(tmp_path / "copy", dataclasses.replace(manifest, environment=elsewhere))
    with pytest.warns(PortableTierWarning):
        portable = iceformer.load(tmp_path / "copy")
    check_scores(portable, dequantized, random_ids(50), atol=1e-4)


@pytest.fixture
def without_kernels() -> Iterator[None]:
    with kernels.disabled():
        yield


def test_kernels_are_called_where_they_are(artifact: Path, session: Session) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    for entry in session.info.buckets[0].entries.values():
        assert kernels.LINEAR in entry.custom_calls
        assert kernels.LINEAR.encode() not in (artifact / entry.portable.path).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_scores_are_alike(checkpoint: Path, tmp_path: Path, dequantized: Any) -> None:
    session = iceformer.load(iceformer.compile(checkpoint, tmp_path / "a", weights="int8", **SMALL))
    assert session.info.environment.kernels == ""
    check_scores(session, dequantized, random_ids(50), atol=1e-4)


@pytest.mark.slow
def test_bfloat16(checkpoint: Path, tmp_path: Path, dequantized: Any) -> None:
    path = iceformer.compile(checkpoint, tmp_path / "a", weights="int8", dtype="bfloat16", **SMALL)
    tensors = {name: info.dtype.name for name, info in load_file(path / "weights.safetensors").items()}
    session = iceformer.load(path)
    linear = [name for name in session.info.weights.tensors if "norm" not in name]
    assert {tensors[name] for name in linear if name.endswith("v_proj.kernel")} == {"bfloat16"}
    kinds = {name.rpartition(".")[2]: tensors[name] for name in linear if "v_proj" not in name}
    assert kinds == {"kernel": "int8", "scale": "float32", "embedding": "bfloat16"}
    # Kernels that were rounded to bfloat16 first may round to another int8.
    check_scores(session, dequantized, random_ids(60), atol=0.3)


@pytest.mark.slow
def test_bfloat16_weights(checkpoint: Path, tmp_path: Path) -> None:
    path = iceformer.compile(checkpoint, tmp_path / "a", weights="bfloat16", **SMALL)
    kinds = {name.rpartition(".")[2]: x.dtype.name for name, x in load_file(path / "weights.safetensors").items()}
    assert kinds == {"kernel": "bfloat16", "scale": "float32", "embedding": "float32"}
    session = iceformer.load(path)
    assert session.info.weights.format == "bfloat16"
    assert session.info.weights.error is not None
    model = iceformer.load_model(checkpoint)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            node.kernel[...] = node.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    check_scores(session, model, random_ids(60), atol=1e-4)


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_tied_output_layer_is_rounded_with_the_embeddings(form: str) -> None:
    architecture, config = build(TINY_LLAMA | {"model_type": "llama", "tie_word_embeddings": True})
    model = architecture.module(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    rounded = round_weights(model, form)
    before, after = model.model.embed_tokens, rounded.model.embed_tokens
    assert (after.embedding[...].dtype.name, before.embedding[...].dtype) == (form, jnp.float32)
    ids = jnp.asarray(random_ids(20)[None] % TINY_LLAMA["vocab_size"])
    vectors = after(ids)
    assert vectors.dtype == jnp.float32
    # Half of a step: of the 8 bits of a bfloat16, or of a 127th of the largest of a token.
    step = jnp.abs(before(ids)).max(-1, keepdims=True) / (127 if form == "int8" else 128)
    assert float(jnp.abs(vectors - before(ids)).max()) > 0
    assert bool((jnp.abs(vectors - before(ids)) <= step * 0.5001).all())
    # The output layer's vectors are those that the embedding gives.
    table = after(jnp.arange(TINY_LLAMA["vocab_size"])[None])[0]
    np.testing.assert_allclose(after.logits(vectors), vectors @ table.T, atol=1e-6)
    assert 0 < float(jnp.abs(rounded(ids) - model(ids)).max()) < 0.05 * float(jnp.abs(model(ids)).max())
    past = after(jnp.array([[TINY_LLAMA["vocab_size"], 0]]))[0]
    assert np.isnan(past).all(axis=1).tolist() == [True, False]


def test_reported_loss_is_that_of_the_sessions(session: Session, exact_session: Session, checkpoint: Path) -> None:
    weights, loss = session.info.weights, session.info.weights.error
    assert loss is not None
    ids, info = calibration_ids(None, checkpoint / "tokenizer.json", VOCABULARY, 512)
    assert (weights.format, loss.text, loss.tokens) == ("int8", info.kind, len(ids))
    ids = ids[:128]  # What fits a session's bucket.
    model = iceformer.load_model(checkpoint)
    loss = quantization_error(model, round_weights(model, "int8"), CalibrationInputs(ids[None], ids.size, info))
    before, after = exact_session.score(ids), session.score(ids)
    assert loss.nll is not None
    assert loss.rounded_nll is not None
    assert loss.greedy_agreement is not None
    assert loss.nll == pytest.approx(-before.logprobs.mean(), abs=1e-4)
    assert loss.rounded_nll == pytest.approx(-after.logprobs.mean(), abs=1e-4)
    assert loss.greedy_agreement == pytest.approx(np.mean(before.argmax == after.argmax))
    assert 0 < abs(loss.rounded_nll - loss.nll) < 0.1
    assert 0.5 < loss.greedy_agreement <= 1


@pytest.mark.parametrize("length", few([1, 256, 257], [257]))
def test_loss_of_any_number_of_tokens(checkpoint: Path, length: int) -> None:
    model = iceformer.load_model(checkpoint)
    ids = random_ids(length).astype(np.int32)
    _, info = calibration_ids(ids, checkpoint / "tokenizer.json", VOCABULARY, 512)
    loss = quantization_error(model, model, CalibrationInputs(ids[None], ids.size, info))
    logprobs = logprobs_of(model, ids)
    expected = -logprobs[np.arange(length - 1), ids[1:]].mean() if length > 1 else 0.0
    assert (loss.tokens, loss.greedy_agreement) == (length, 1.0)
    assert loss.nll == loss.rounded_nll == pytest.approx(expected, abs=1e-4)


def test_size_and_description(artifact: Path, session: Session, exact_session: Session) -> None:
    info, floats = session.info, exact_session.info
    assert info.model.parameters == floats.model.parameters
    assert (floats.weights.format, floats.weights.error) == ("same", None)
    arrays = load_file(artifact / "weights.safetensors").values()
    less = sum(array.size * (4 - array.itemsize) for array in arrays if array.dtype in (np.int8, jnp.bfloat16))
    saved = floats.weights.file.size - info.weights.file.size
    assert 0.9 * less < saved < less
    loss = info.weights.error
    assert loss is not None
    card = (artifact / "README.md").read_text()
    assert f"| {loss.tokens} | {loss.nll:.4f} | {loss.rounded_nll:.4f} |" in card
    shown = CliRunner().invoke(app, ["inspect", str(artifact)], env={"COLUMNS": "200"}).output
    for text in ("linear layers in int8", "int8 weights", f"{loss.rounded_nll:.4f}", f"{loss.greedy_agreement:.2%}"):
        assert text in shown
