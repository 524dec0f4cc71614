"""Artifacts with int4 weights: they compute what their weights say, which are rounded for a text, and say so."""

import re
import shutil
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
from iceformer.cli import app
from iceformer.deploy.calibrated_rounding import GPTQ, NEAREST, round_for_inputs, round_model, rounding_text
from iceformer.deploy.session import Session
from iceformer.model.modules import Linear
from iceformer.model.panels import unpack
from iceformer.model.rounding import round_weights

from ..few import few
from .conftest import CHUNK, VOCABULARY

OPTIONS: dict[str, Any] = {"buckets": (64,), "attention": iceformer.Exact(), "chunk": CHUNK, "weights": "int4"}


def text_like(tokens: int, seed: int = 0) -> np.ndarray:
    """Ids of which few are frequent, as in a text."""
    ranks = np.random.default_rng(seed).zipf(1.3, tokens)
    return (4 + ranks % (VOCABULARY - 4)).astype(np.int32)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int4") / "artifact"
    return iceformer.compile(checkpoint, path, calibration=text_like(400), **OPTIONS)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)


def multiplied_out(model: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The float32 model with the artifact's kernels."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            name = ".".join(map(str, path))
            scale = jnp.asarray(tensors[f"{name}.scale"], jnp.float32)
            features, outputs = node.kernel.shape
            kernel = unpack(jnp.asarray(tensors[f"{name}.kernel"]), features)[:, :outputs]
            node.kernel[...] = kernel * jnp.repeat(scale, features // len(scale), axis=0)
    return model


def test_scores_and_writes_as_the_multiplied_out_model(artifact: Path, session: Session, checkpoint: Path) -> None:
    model = multiplied_out(iceformer.load_model(checkpoint), load_file(artifact / "weights.safetensors"))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)[0]))
    ids = text_like(40, seed=1)
    expected = np.asarray(forward(ids[None]))[np.arange(39), ids[1:]]
    np.testing.assert_allclose(session.score(ids).logprobs, expected, atol=1e-4)
    text = ids.tolist()
    for _ in range(6):
        text.append(int(forward(np.pad(text, (0, 64 - len(text)))[None])[len(text) - 1].argmax()))
    assert session.generate(ids, max_new_tokens=6).ids.tolist() == text[40:]


def test_formats_of_the_weights(artifact: Path) -> None:
    tensors = load_file(artifact / "weights.safetensors")
    forms = {name: array.dtype.name for name, array in tensors.items() if name.endswith("kernel")}
    assert forms["lm_head.kernel"] == "int8"
    assert {forms.pop(name) for name in list(forms) if "v_proj" in name or "lm_head" in name} == {"int8"}
    assert set(forms.values()) == {"uint8"}
    scales = {tensors[name.replace("kernel", "scale")].dtype.name for name in forms}
    assert scales == {"bfloat16"}


def test_manifest_card_and_inspect_say_how(artifact: Path, session: Session) -> None:
    weights = session.info.weights
    assert (weights.format, weights.group, weights.rounding, weights.fitted_tokens) == ("int4", 32, GPTQ, 300)
    assert weights.error is not None
    assert (weights.error.text, weights.error.tokens) == ("ids", 100)
    assert weights.error.greedy_agreement is not None
    assert 0.3 < weights.error.greedy_agreement <= 1
    card = (artifact / "README.md").read_text()
    assert "int4 with a scale for every 32 inputs" in card
    assert "rounded by GPTQ for 300 tokens of text; the loss is that of the tokens behind them" in card
    printed = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    shown = " ".join(re.sub("[│┃]", " ", printed).split())  # the terminal's width decides where lines end
    for text in ("linear layers in int4, a scale for 32 inputs", "rounded by GPTQ for 300 tokens", "int4 weights"):
        assert text in shown


def test_the_loss_is_that_of_the_tokens_which_the_rounding_has_not_seen(
    artifact: Path, session: Session, checkpoint: Path
) -> None:
    error, model = session.info.weights.error, iceformer.load_model(checkpoint)
    ids, tensors = text_like(400), load_file(artifact / "weights.safetensors")
    assert error is not None
    for nll in (error.nll, error.rounded_nll):
        logprobs = np.asarray(jax.nn.log_softmax(model(jnp.asarray(ids[None]))[0]))
        assert nll == pytest.approx(-logprobs[np.arange(300, 399), ids[301:]].mean(), abs=1e-4)
        model = multiplied_out(model, tensors)


@pytest.mark.slow
def test_rounding_for_a_text_keeps_more_of_the_model(checkpoint: Path) -> None:
    """Of hidden states over another text of the same kind."""
    model: Any = iceformer.load_model(checkpoint)
    told: list[str] = []
    fitted = round_for_inputs(model, text_like(1024)[None], told.append).model
    assert told == ["rounding the weights of layer 1 of 2", "rounding the weights of layer 2 of 2"]
    ids = jnp.asarray(text_like(256, seed=2)[None])

    def change(rounded: Any) -> float:
        return float(jnp.square(rounded(ids) - model(ids)).mean())

    assert change(fitted) < 0.75 * change(round_weights(model, "int4"))


@pytest.mark.slow
def test_without_a_text_each_weight_is_rounded_to_its_nearest(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for file in (tmp_path / "checkpoint").glob("tokenizer*"):
        file.unlink()
    path = iceformer.compile(tmp_path / "checkpoint", tmp_path / "artifact", **OPTIONS)
    weights = iceformer.load(path).info.weights
    assert (weights.rounding, weights.fitted_tokens) == (NEAREST, 0)
    assert weights.error is not None
    assert weights.error.text == "random ids"
    assert "Weights are each rounded to its nearest: there was no text" in (path / "README.md").read_text()
    expected = round_weights(iceformer.load_model(checkpoint), "int4")
    kernel = load_file(path / "weights.safetensors")["model.layers.0.mlp.up_proj.kernel"]
    np.testing.assert_array_equal(kernel, expected.model.layers[0].mlp.up_proj.kernel[...])


def test_other_formats_and_models_without_text_need_none(checkpoint: Path) -> None:
    model: Any = iceformer.load_model(checkpoint)
    tokenizer, said = checkpoint / "tokenizer.json", []
    text = rounding_text(model, "int8", text_like(100), tokenizer)
    assert (text.method, text.first, text.judged.tokens) == (NEAREST, 0, 100)
    round_model(model, "int8", text, said.append)
    assert said == ["rounding the weights"]
    assert rounding_text(model, "int4", None, tokenizer.with_name("none")).method == NEAREST


@pytest.mark.parametrize(
    ("length", "rows", "row", "judged"), [(400, 1, 300, 400), (5000, 8, 497, 512), (20000, 30, 512, 512)]
)
def test_a_long_text_is_cut_into_rows(checkpoint: Path, length: int, rows: int, row: int, judged: int) -> None:
    """The model takes 512 tokens."""
    model, ids = iceformer.load_model(checkpoint), text_like(length)
    text = rounding_text(model, "int4", ids, checkpoint / "tokenizer.json")
    used = min(length, 16384)
    assert text.fitted_tokens == used - min(used // 4, 1024)
    np.testing.assert_array_equal(text.inputs, ids[: rows * row].reshape(rows, row))
    np.testing.assert_array_equal(text.judged.inputs[0], ids[used - judged : used])
    assert text.first == max(judged - (used - text.fitted_tokens), 0)


@pytest.mark.parametrize("length", few([1, 3, 5], [3]))
def test_a_few_tokens_are_a_text(checkpoint: Path, length: int) -> None:
    model: Any = iceformer.load_model(checkpoint)
    text = rounding_text(model, "int4", text_like(length), checkpoint / "tokenizer.json")
    assert (text.method, text.fitted_tokens) == (GPTQ, length - length // 4)
    assert text.judged.tokens - text.first == (length // 4 or length)
    rounded = round_model(model, "int4", text, list[str]().append).model
    assert np.isfinite(rounded(jnp.asarray(text.judged.inputs))).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 5])
def test_texts_of_a_few_tokens(checkpoint: Path, tmp_path: Path, length: int) -> None:
    path = iceformer.compile(checkpoint, tmp_path / "a", calibration=text_like(length), **OPTIONS)
    weights = iceformer.load(path).info.weights
    assert (weights.rounding, weights.fitted_tokens) == (GPTQ, length - length // 4)
    assert weights.error is not None
    assert weights.error.tokens == (length // 4 or length)


@pytest.mark.slow
def test_encoders_are_rounded_for_a_text_too(minilm_checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"buckets": (128,), "attention": iceformer.Exact(), "weights": "int4"}
    session = iceformer.load(iceformer.compile(minilm_checkpoint, tmp_path / "a", **options))
    weights = session.info.weights
    assert weights.rounding == GPTQ
    assert weights.error is not None
    assert weights.error.cosine is not None
    assert 0.9 < weights.error.cosine < 1
