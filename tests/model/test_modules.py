"""Layers, where the parity of whole models does not look: few rows in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from iceformer.model.modules import Embedding, Linear


@pytest.mark.parametrize("shape", [(1, 16), (2, 1, 16), (16,)])
def test_few_rows_in_bfloat16_give_what_many_do(shape: tuple[int, ...]) -> None:
    linear = Linear(16, 24, use_bias=True, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    embedding = Embedding(24, 16, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
    rows = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    many = jnp.tile(rows.reshape(-1, 16), (9, 1))
    for product in (linear.in_float32, embedding.logits):
        few = product(rows)
        assert few.shape == (*shape[:-1], 24)
        np.testing.assert_allclose(few.reshape(-1, 24), product(many)[: many.shape[0] // 9], atol=1e-6)
