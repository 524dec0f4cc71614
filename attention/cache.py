"""The KV cache: one fixed-capacity key and value buffer per layer, explicit in every call and donated by the caller.

A pytree of plain arrays, so that an executable takes it as an argument and gives it back without copying.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from .methods import project_keys


class LayerCache(NamedTuple):
    """Keys (after the rotary embedding) and values of one layer, and what stage 1 keeps of the keys, where it does."""

    key: Float[Array, "batch kv_heads capacity head_dim"]
    value: Float[Array, "batch kv_heads capacity head_dim"]
    projected: Int8[Array, "batch kv_heads capacity padded_rank"] | None = None


KVCache = tuple[LayerCache, ...]


def empty_cache(
    num_layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """A cache of zeros for `capacity` tokens a row."""
    shape = (batch, kv_heads, capacity, head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers))


def write(
    cache: LayerCache,
    key: Float[Array, "batch kv_heads tokens head_dim"],
    value: Float[Array, "batch kv_heads tokens head_dim"],
    offset: Int[Array, " batch"],
    basis: Float[Array, "kv_heads 2 head_dim rank"] | None = None,
) -> LayerCache:
    """Puts new tokens at positions `offset .. offset + tokens` of each row; their projections too where the cache has
    them, which takes the basis.

    The caller sees to it that `offset + tokens <= capacity`: past the end, XLA would move the write back.
    """

    def put(buffer: Array, update: Array) -> Array:
        # Row by row, because one batched update with an offset per row becomes a scatter, which copies the buffer.
        for row in range(buffer.shape[0]):
            block = update[row : row + 1].astype(buffer.dtype)
            buffer = lax.dynamic_update_slice(buffer, block, (row, 0, offset[row], 0))
        return buffer

    projected = cache.projected
    if projected is not None:
        if basis is None:
            raise ValueError("the cache keeps projected keys: writing to it needs the basis that projects them")
        projected = put(projected, project_keys(key, basis))
    return LayerCache(put(cache.key, key), put(cache.value, value), projected)
