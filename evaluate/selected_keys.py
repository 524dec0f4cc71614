"""Which keys an attention selects: read off its output, whatever it is.

Where the value of key j is the j-th unit vector, the output of attention is the weights themselves. This asks nothing
of a strategy but what every one has, its form in XLA, so that every ranker and every rule of how many keys a block
gets is seen as it is.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..attention import Attention, Constants, KeyView, Mask, Rows, TwoStage, attend

_COLUMNS = 8192
"""Keys whose weights are read off at a time: so many int8 for each key are held."""


def selected_keys(
    attention: Attention,
    query: Float[Array, "blocks query_heads queries head_dim"],
    key: Float[Array, "1 kv_heads tokens head_dim"],
    rows: Rows,
    mask: Mask,
    constants: Constants,
) -> Bool[Array, "blocks query_heads tokens"]:
    """Whether some query of a block and head gives each key a weight, for blocks that are rows of a call over the same
    keys.

    A key to which every query gives less than 1e-38 of its weight counts as not selected. What stands in for the keys
    that are left out (compensation) selects none of them.
    """
    if isinstance(attention, TwoStage):
        attention = replace(attention, compensation="none")
    (blocks, heads), tokens = query.shape[:2], key.shape[2]
    group = heads // key.shape[1]
    columns = min(_COLUMNS, tokens)
    parts = -(-tokens // columns)
    position = jnp.arange(tokens)[:, None]

    def part(number: Array) -> Array:
        unit = (position == number * columns + jnp.arange(columns)).astype(jnp.int8)[None, None]
        ones = jnp.ones((1, 1, tokens), jnp.float32)

        def of_block(index: Array) -> Array:
            block, head = index // heads, index % heads
            one = KeyView(key[:, head // group][:, None], unit, value_scale=ones)
            own: dict[str, Any] = {name: constant[head // group][None] for name, constant in constants.items()}
            where = Rows(*(x[block][None] for x in rows))
            weights = attend(attention, query[block, head][None, None], one, where, mask, own)
            return jnp.any(weights > 0, axis=(0, 1, 2))

        return lax.map(of_block, jnp.arange(blocks * heads))

    with kernels.disabled():
        found = lax.map(part, jnp.arange(parts))
    return jnp.moveaxis(found, 0, 1).reshape(blocks, heads, -1)[:, :, :tokens]
