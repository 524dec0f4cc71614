"""The whole model under jit: one compilation a shape, where an eager call compiles every operation."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

import iceformer
from iceformer.attention import Attention
from iceformer.model.decoder import CausalLM


def load_decoder(checkpoint: Path, dtype: str = "float32") -> CausalLM:
    """`load_model`, of a decoder."""
    model = iceformer.load_model(checkpoint, dtype)
    assert isinstance(model, CausalLM)
    return model


def forward(
    model: CausalLM,
    ids: ArrayLike,
    lengths: ArrayLike | None = None,
    attention: Attention = iceformer.Exact(),  # noqa: B008 - a frozen value
) -> np.ndarray:
    """`model(ids, lengths, attention=attention)`."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, ids: jax.Array, lengths: jax.Array | None) -> jax.Array:
        return nnx.merge(graph, state)(ids, lengths, attention=attention)

    return np.asarray(run(state, ids, lengths))
