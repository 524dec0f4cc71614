"""An artifact that multiplies prompts in integers: what it computes, what it reports, and what is refused."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

import iceformer
from iceformer import kernels
from iceformer.cli import app
from iceformer.deploy.session import Session
from iceformer.model.modules import Linear
from iceformer.model.registry import build
from iceformer.model.rounding import round_weights

from ..conftest import TINY_LLAMA
from .conftest import CHUNK, VOCABULARY

SMALL: dict[str, Any] = {"buckets": (64,), "attention": iceformer.Exact(), "chunk": CHUNK, "weights": "int8"}
IDS = np.random.default_rng(0).integers(4, VOCABULARY, 50)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return iceformer.compile(checkpoint, tmp_path_factory.mktemp("a") / "artifact", activations="int8", **SMALL)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)


@pytest.fixture(scope="module")
def in_xla(checkpoint: Path) -> dict[str, np.ndarray]:
    """The scores of `IDS` by a model with int8 weights, for each format of activations."""

    def scores(activations: str) -> np.ndarray:
        model = round_weights(iceformer.load_model(checkpoint), "int8", activations)
        with kernels.disabled():
            logits = jax.jit(lambda tokens: model(tokens)[0])(jnp.asarray(IDS[None]))
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(49), IDS[1:]]

    return {activations: scores(activations) for activations in ("same", "int8", "int16")}


def test_scores_are_those_of_the_rounded_model_in_xla(session: Session, in_xla: dict[str, np.ndarray]) -> None:
    assert session.info.activations == "int8"
    # A number next to the middle of two integers may become the other one where sums differ in their order.
    np.testing.assert_allclose(session.score(IDS).logprobs, in_xla["int8"], atol=5e-3)


def test_activations_cost_something_but_little(in_xla: dict[str, np.ndarray]) -> None:
    coarse, fine = (np.abs(in_xla[activations] - in_xla["same"]).max() for activations in ("int8", "int16"))
    assert 1e-3 < coarse < 0.5
    assert 0 < fine < coarse / 50


def test_the_loss_is_measured_and_shown(artifact: Path, session: Session) -> None:
    loss = session.info.weights.error
    assert loss is not None
    assert loss.nll is not None
    assert loss.rounded_nll is not None
    assert 0 < abs(loss.rounded_nll - loss.nll) < 0.1
    card = (artifact / "README.md").read_text()
    assert "multiply more than 4 rows,\nint8 with a scale for every 64 numbers of a row" in card
    printed = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    shown = " ".join(re.sub("[│┃]", " ", printed).split())  # the terminal's width decides where lines end
    for text in ("int8 weights, int8 activations", "activations rounded to int8", f"{loss.rounded_nll:.4f}"):
        assert text in shown


def test_new_tokens_are_written(session: Session) -> None:
    written = session.generate(IDS[:40], max_new_tokens=4)
    assert len(written.ids) == 4


def test_all_layers_with_int8_weights_round_but_the_output_layer() -> None:
    architecture, config = build(TINY_LLAMA | {"model_type": "llama", "tie_word_embeddings": False})
    model = round_weights(architecture.module(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32), "int8", "int8")
    levels = {path[-1]: node.levels for path, node in nnx.iter_graph(model) if isinstance(node, Linear)}
    assert {name for name, most in levels.items() if most == 0} == {"v_proj", "lm_head"}
    assert set(levels.values()) == {0, 127}


def test_an_encoder(minilm_checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"buckets": (128,), "attention": iceformer.Exact(), "weights": "int8"}
    session = iceformer.load(iceformer.compile(minilm_checkpoint, tmp_path / "a", activations="int8", **options))
    loss = session.info.weights.error
    assert loss is not None
    assert loss.cosine is not None
    assert 0.98 < loss.cosine < 0.9999
    pooled = session.encode("The fox counts the stars.").pooled
    assert pooled is not None
    assert np.isfinite(pooled).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations is 'int4', expected one of: same, int8, int16"),
        ({"activations": "int8", "weights": "same"}, "only int8 weights are multiplied with rounded activations"),
        ({"activations": "int8", "weights": "bfloat16"}, "activations is 'int8' and weights is 'bfloat16'"),
    ],
)
def test_refusals(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iceformer.compile(checkpoint, tmp_path / "a", **SMALL | options)
    assert list(tmp_path.iterdir()) == []
