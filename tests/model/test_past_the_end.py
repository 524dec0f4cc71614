"""What a model makes of padding reaches no output of a row: padding tokens whose embedding is NaN change nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from iceformer import kernels
from iceformer.attention import Plan, Rows
from iceformer.model.decoder import CausalLM
from iceformer.model.encoder import Encoder
from iceformer.model.registry import build

from ..few import few
from .cases import CASES

LRA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"model_type": name, **cases.tiny} for name, cases in CASES.items() if "image_size" not in cases.tiny},
    "modernbert, mean": {
        "model_type": "modernbert",
        **CASES["modernbert"].tiny,
        "classifier_pooling": "mean",
        "architectures": ["ModernBertForSequenceClassification"],
    },
    **{
        f"lra, {pooling}": {"model_type": "lra", **LRA, "classifier_pooling": pooling}
        for pooling in ("cls", "mean", "padded_mean")
    },
}
TOKENS, LENGTHS, PADDING = 24, (24, 17, 3), 7


@pytest.mark.parametrize("name", few(CONFIGS, ["qwen3_moe"]))
def test_padding_reaches_no_output(name: str) -> None:
    architecture, config = build(CONFIGS[name])
    model = architecture.module(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    table: Any = model.model.embed_tokens if isinstance(model, CausalLM) else model.embeddings.word_embeddings
    lengths = jnp.array(LENGTHS, jnp.int32)
    inside = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
    ids = np.random.default_rng(0).integers(8, table.embedding.shape[0], (3, TOKENS))
    ids = jnp.asarray(np.where(inside, ids, PADDING), jnp.int32)
    graph = nnx.graphdef(model)

    @jax.jit
    def run(state: nnx.State) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state)
        if isinstance(model, Encoder):
            inputs = {name: ids if name == "input_ids" else jnp.zeros_like(ids) for name in model.inputs(TOKENS)}
            return model.encode(inputs, lengths)
        hidden, _ = model.hidden_states(ids, Rows.whole(lengths), plan=Plan())
        return {"last_hidden_state": hidden}

    def outputs(embedding: float) -> dict[str, np.ndarray]:
        table.embedding[...] = table.embedding[...].at[PADDING].set(embedding)
        with kernels.disabled():
            found = {name: np.asarray(x) for name, x in run(nnx.state(model)).items()}
        padded = found["last_hidden_state"][~inside]
        assert np.isnan(embedding) == np.isnan(padded).all()
        return {name: x[inside] if x.shape[:2] == inside.shape else x for name, x in found.items()}

    expected = outputs(0.5)
    for name, found in outputs(np.nan).items():
        assert np.isfinite(expected[name]).all()
        np.testing.assert_array_equal(found, expected[name], err_msg=name)
