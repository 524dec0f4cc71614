"""Artifacts of a mixture of experts: they compute what their rounded weights say, and say what those cost."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import iceformer
from iceformer import kernels
from iceformer.convert.parameters import save_params
from iceformer.deploy.calibrated_rounding import GPTQ, round_experts_for_inputs
from iceformer.deploy.card import card_text
from iceformer.deploy.tables import rounding_tables
from iceformer.model.modules import Linear
from iceformer.model.moe import SparseMoE
from iceformer.model.panels import unpack
from iceformer.model.registry import build
from iceformer.model.rounding import round_experts

from ..conftest import TINY_LLAMA
from ..model.test_moe import in_numpy, weights_of

VOCABULARY, EXPERTS, HIDDEN, INTERMEDIATE = 96, 4, 32, 64
CONFIG: dict[str, Any] = TINY_LLAMA | {
    "model_type": "mixtral",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
OPTIONS: dict[str, Any] = {"buckets": (32,), "attention": iceformer.Exact(), "chunk": 32}


def text_like(tokens: int, seed: int = 0) -> np.ndarray:
    """Ids of which few are frequent, as in a text."""
    ranks = np.random.default_rng(seed).zipf(1.3, tokens)
    return (ranks % VOCABULARY).astype(np.int32)


def random_model() -> Any:
    """With weights large enough that a mistake shows in the logits."""
    architecture, config = build(CONFIG)
    model = architecture.module(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    rng = np.random.default_rng(0)

    def draw(x: jax.Array) -> jax.Array:
        return x if x.ndim < 2 else jnp.asarray(rng.standard_normal(x.shape) * 0.2, jnp.float32)

    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    save_params(folder / "params", nnx.to_pure_dict(nnx.state(random_model())))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "iceformer.json").write_text(json.dumps({"format": 2}))
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    path = checkpoint / "int4"
    return iceformer.compile(checkpoint, path, weights="int4", calibration=text_like(400), **OPTIONS)


def multiplied_out(model: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The float32 model with the artifact's kernels."""

    def kernel(name: str, shape: tuple[int, ...]) -> jax.Array:
        weights = jnp.asarray(tensors[f"{name}.kernel"])
        if f"{name}.scale" not in tensors:
            return weights.astype(jnp.float32)
        scale = jnp.asarray(tensors[f"{name}.scale"], jnp.float32)
        return unpack(weights, shape[0])[:, : shape[1]] * jnp.repeat(scale, shape[0] // len(scale), axis=0)

    for path, node in nnx.iter_graph(model):
        name = ".".join(map(str, path))
        if isinstance(node, Linear):
            node.kernel[...] = kernel(name, node.kernel.shape)
        if isinstance(node, SparseMoE):
            stacks: Any = node
            gate, up, down = stacks.gate_proj, stacks.up_proj, stacks.down_proj
            for expert in range(EXPERTS):
                both = kernel(f"{name}.experts.{expert}.gate_up_proj", (HIDDEN, 2 * INTERMEDIATE))
                gate[expert], up[expert] = both[:, :INTERMEDIATE], both[:, INTERMEDIATE:]
                down[expert] = kernel(f"{name}.experts.{expert}.down_proj", (INTERMEDIATE, HIDDEN))
    return model


def check(path: Path, checkpoint: Path) -> None:
    """An artifact scores and writes as the model with its weights multiplied out does."""
    session = iceformer.load(path)
    model = multiplied_out(iceformer.load_model(checkpoint), load_file(path / "weights.safetensors"))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)[0]))
    ids = text_like(20, seed=1)
    expected = np.asarray(forward(np.pad(ids, (0, 12))[None]))[np.arange(19), ids[1:]]
    np.testing.assert_allclose(session.score(ids).logprobs, expected, atol=1e-4)
    text = ids.tolist()
    for _ in range(6):
        text.append(int(forward(np.pad(text, (0, 32 - len(text)))[None])[len(text) - 1].argmax()))
    assert session.generate(ids, max_new_tokens=6).ids.tolist() == text[20:]


def test_scores_and_writes_as_the_multiplied_out_model(artifact: Path, checkpoint: Path) -> None:
    check(artifact, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "bfloat16", "same"])
def test_other_formats(checkpoint: Path, tmp_path: Path, form: str) -> None:
    check(iceformer.compile(checkpoint, tmp_path / "a", weights=form, **OPTIONS), checkpoint)


@pytest.mark.slow
def test_without_kernels(checkpoint: Path, tmp_path: Path) -> None:
    with kernels.disabled():
        check(iceformer.compile(checkpoint, tmp_path / "a", weights="int8", **OPTIONS), checkpoint)


def test_experts_are_small_and_said_to_be(artifact: Path) -> None:
    tensors = load_file(artifact / "weights.safetensors")
    experts = {name: array for name, array in tensors.items() if ".experts." in name}
    assert {name.rpartition(".")[2]: array.dtype.name for name, array in experts.items()} == {
        "kernel": "uint8",
        "scale": "bfloat16",
    }
    # 4 bits a weight, and a bfloat16 for every 32 of them.
    weights = EXPERTS * 3 * HIDDEN * INTERMEDIATE
    assert sum(array.nbytes for array in experts.values()) == weights * 4.5 / 8
    session = iceformer.load(artifact)
    found, error = session.info.weights, session.info.weights.error
    assert (found.format, found.rounding, found.fitted_tokens, found.unseen_experts) == ("int4", GPTQ, 300, 0)
    assert session.info.model.parameters == sum(x.size for x in jax.tree.leaves(nnx.state(random_model())))
    assert error is not None
    assert error.nll != error.rounded_nll
    assert "kernels of linear layers, experts and convolutions" in (artifact / "README.md").read_text()


def test_the_loss_table_says_how_many_experts_got_no_token(artifact: Path) -> None:
    manifest = iceformer.load(artifact).info
    weights = dataclasses.replace(manifest.weights, unseen_experts=2)
    (table,) = rounding_tables(dataclasses.replace(manifest, weights=weights))
    said = "rounded by GPTQ for 300 tokens of text, of which 2 experts got none"
    assert table.caption == f"exact attention, before and after rounding; {said}"
    assert said in card_text(dataclasses.replace(manifest, weights=weights), "a")
    (table,) = rounding_tables(manifest)
    assert table.caption == "exact attention, before and after rounding"


def mixture_of(rngs: nnx.Rngs, gate: np.ndarray) -> Any:
    """A mixture with random experts and the given router."""
    made: dict[str, Any] = {"num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_act": "silu"}
    mixture = SparseMoE(HIDDEN, INTERMEDIATE, num_experts=gate.shape[1], rngs=rngs, param_dtype=jnp.float32, **made)
    for stack in (mixture.gate_proj, mixture.up_proj, mixture.down_proj):
        assert stack is not None
        stack[...] *= 15
    mixture.gate.kernel[...] = jnp.asarray(gate, jnp.float32)
    return mixture


def correlated(tokens: int, seed: int) -> jax.Array:
    """Inputs that depend on each other, whatever the seed."""
    spread = np.random.default_rng(0).standard_normal((6, HIDDEN))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 6)) @ spread + 0.1 * rng.standard_normal((tokens, HIDDEN))
    return jnp.asarray(x, jnp.float32)


def test_experts_are_rounded_for_the_tokens_that_they_get() -> None:
    """Beside rounding to the nearest, they keep more of what they make of other tokens of the same kind."""
    one, other, third = np.random.default_rng(3).standard_normal((3, HIDDEN))
    # Of two opposite logits one is above 0, so that two others are above that of the first expert.
    gate = np.stack([np.zeros(HIDDEN), one, -one, other, -other, third], axis=1)
    exact, fitted, nearest = (mixture_of(nnx.Rngs(0), gate) for _ in range(3))
    assert round_experts_for_inputs(fitted, correlated(500, seed=1)) == 1
    round_experts(nearest, "int4")
    x, stacks = correlated(100, seed=2), [exact.gate_proj[...], exact.up_proj[...], exact.down_proj[...]]
    expected = in_numpy(exact, list(zip(*map(np.asarray, stacks), strict=True)), x)

    def change(mixture: SparseMoE) -> float:
        return float(np.square(in_numpy(exact, weights_of(mixture), x) - expected).mean())

    assert 0 < change(fitted) < 0.5 * change(nearest)
    pairs = list(zip(fitted.experts, nearest.experts, strict=True))

    def equal(layer: str) -> list[bool]:
        return [np.array_equal(getattr(a, layer).kernel[...], getattr(b, layer).kernel[...]) for a, b in pairs]

    assert equal("down_proj") == [True, *[False] * 5]
    # Those of the expert without tokens are rounded for the tokens of the others.
    assert equal("gate_up_proj") == [False] * 6
