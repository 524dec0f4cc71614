"""Compensation for the keys that a selection leaves out: each block of them enters the softmax as one mean key.

A block of c left-out keys with mean key k and mean value v counts as one key with the logit query . k * scale + log c
and the value v. That is exact where the block's keys are equal. Otherwise it is exact to first order in how far keys
and values lie from their means: it ignores the spread of the logits within the block and how they vary with the values.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .blocks import MASKED, Visibility
from .exact import Head, Partial, merge, normalise
from .keys import KeyView, as_floats
from .logits import Logits
from .ops import cap, matmul, matmul_transposed

MEAN_BLOCK = 64
"""Keys, in tokens, that share one mean."""


class BlockSums(NamedTuple):
    """Sums of the keys and of the values of every `MEAN_BLOCK` tokens, in float32."""

    key: Float[Array, "*pages mean_blocks head_dim"]
    value: Float[Array, "*pages mean_blocks value_dim"]

    def of_head(self, keys: KeyView, head: Head) -> "BlockSums":
        """Those of one head of a slot, in the order of its tokens."""
        count, start = keys.capacity // MEAN_BLOCK, jnp.int32(0)
        return BlockSums(*(keys.run(x, *head, start, count) for x in self))


class SelectedKeys(NamedTuple):
    """The keys that a query block attends to; `visible` is False for the places that hold none."""

    position: Int[Array, " budget"]
    visible: Bool[Array, " budget"]
    key: Float[Array, "budget head_dim"]
    value: Float[Array, "budget value_dim"]


def block_sums(keys: KeyView) -> BlockSums:
    """Sums of all pages and heads; a page is a multiple of `MEAN_BLOCK`."""

    def sums(x: Array, scale: Array | None) -> Array:
        runs = as_floats(x, scale, jnp.float32).reshape(*x.shape[:2], -1, MEAN_BLOCK, x.shape[3])
        return jnp.sum(runs.astype(jnp.float32), axis=3)

    return BlockSums(sums(keys.key, keys.key_scale), sums(keys.value, keys.value_scale))


def compensate(
    part: Partial,
    query: Float[Array, "lanes head_dim"],
    selection: SelectedKeys,
    sums: BlockSums,
    visibility: Visibility,
    logits_of: Logits,
) -> Partial:
    """Adds the means of what `selection` leaves out, in the blocks that every query of the block sees whole."""
    blocks = sums.key.shape[0]
    block = selection.position // MEAN_BLOCK
    taken = selection.visible.astype(jnp.float32)
    left = MEAN_BLOCK - jnp.zeros(blocks).at[block].add(taken)
    key_sum = sums.key.at[block].add(-taken[:, None] * selection.key.astype(jnp.float32))
    value_sum = sums.value.at[block].add(-taken[:, None] * selection.value.astype(jnp.float32))

    seen = jnp.minimum(visibility.length, jnp.min(visibility.position)) if visibility.causal else visibility.length
    usable = (left > 0) & ((jnp.arange(blocks) + 1) * MEAN_BLOCK <= seen)
    count = jnp.where(usable, left, 1.0)
    mean_key = (key_sum / count[:, None]).astype(query.dtype)
    logits = cap(matmul_transposed(query, mean_key) * logits_of.scale, logits_of.softcap) + jnp.log(count)
    logits = jnp.where(usable, logits, MASKED)
    largest = jnp.max(logits, axis=1)
    weights = jnp.where(usable, jnp.exp(logits - largest[:, None]), 0.0)
    # Sums past the row's end may be NaN, which a weight of 0 does not make 0.
    mean_value = jnp.where(usable[:, None], value_sum / count[:, None], 0.0)
    means = normalise(matmul(weights, mean_value), largest, jnp.sum(weights, axis=1))
    return merge(part, means)
