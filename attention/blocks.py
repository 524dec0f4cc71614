"""How attention is cut into work: query blocks that are computed together, over flat keys, in loops with dynamic
bounds.

A query block holds `query_block` consecutive queries: of one query head where keys are selected, and where attention is
exact of all that share one KV head. These are a block's lanes, group-major: lane = group * query_block + query.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .rows import Mask, Rows

MASKED = float(jnp.finfo(jnp.float32).min)
"""The logit of a key that is not visible. Finite, so that no subtraction of it gives NaN."""


EXACT_QUERY_BLOCK, EXACT_KEY_BLOCK = 256, 512
"""Queries and keys, in tokens, of one step of exact attention in XLA."""


class Visibility(NamedTuple):
    """Which keys the queries of one block may see: key j iff j < length, (not causal or j <= position), and, where
    there is a window, |position - j| < window."""

    position: Int[Array, " lanes"]
    length: Int[Array, ""]
    causal: bool
    window: int | None = None

    def start(self) -> Int[Array, ""]:
        """A key position before which no query of the block sees any."""
        if self.window is None:
            return jnp.zeros((), jnp.int32)
        return jnp.maximum(jnp.min(self.position) - (self.window - 1), 0)

    def end(self) -> Int[Array, ""]:
        """The first key position from which on no query of the block sees any."""
        if self.causal:
            return jnp.minimum(self.length, jnp.max(self.position) + 1)
        if self.window is None:
            return self.length
        # The smaller of window and length is added, because a window may be as large as an integer gets.
        return jnp.minimum(self.length, jnp.max(self.position) + jnp.minimum(self.window, self.length))

    def mask(self, key_position: Int[Array, " keys"]) -> Bool[Array, "#lanes keys"]:
        """The visible keys among those at the given positions."""
        visible = (key_position < self.length)[None, :]
        behind = self.position[:, None] - key_position[None, :]
        if self.causal:
            visible &= behind >= 0
        if self.window is not None:
            visible &= jnp.abs(behind) < self.window
        return visible


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros behind its end, so that the axis is a multiple of the given size."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def split_queries(
    query: Float[Array, "batch query_heads queries width"], kv_heads: int, query_block: int
) -> Float[Array, "heads blocks lanes width"]:
    """Groups queries into blocks, behind each batch row and KV head, padded to whole blocks."""
    batch, query_heads, _, width = query.shape
    query = pad_axis(query, 2, query_block)
    group, blocks = query_heads // kv_heads, query.shape[2] // query_block
    query = query.reshape(batch * kv_heads, group, blocks, query_block, width).transpose(0, 2, 1, 3, 4)
    return query.reshape(batch * kv_heads, blocks, group * query_block, width)


def join_queries(
    blocked: Float[Array, "heads blocks lanes width"], batch: int, queries: int, query_block: int
) -> Float[Array, "batch query_heads queries width"]:
    """Undoes `split_queries`, without the padding."""
    heads, blocks, lanes, width = blocked.shape
    blocked = blocked.reshape(heads, blocks, lanes // query_block, query_block, width).transpose(0, 2, 1, 3, 4)
    return blocked.reshape(batch, -1, blocks * query_block, width)[:, :, :queries]


def visibility_of_block(
    block: Int[Array, ""],
    offset: Int[Array, ""],
    length: Int[Array, ""],
    mask: Mask,
    lanes: int,
    query_block: int,
) -> Visibility:
    """What the lanes of a query block see, when the call's first query stands at `offset`."""
    within = jnp.arange(lanes, dtype=jnp.int32) % query_block
    return Visibility(offset + block * query_block + within, length, mask.causal, mask.window)


def seen_lengths(rows: Rows, queries: int, capacity: int, causal: bool) -> Int[Array, " rows"]:
    """The first position of each row that no query of a call sees.

    Under the causal mask that is no later than the call's end, whatever the row's length: there the queries that fill
    up the last block would see what memory held before.
    """
    lengths = jnp.minimum(rows.length, capacity)
    return jnp.minimum(lengths, rows.offset + queries) if causal else lengths


def valid_blocks(
    offset: Int[Array, "*rows"], length: Int[Array, "*rows"], blocks: int, query_block: int
) -> Int[Array, "*rows"]:
    """How many of the query blocks hold a query before `length`; the rest is padding, which nobody computes."""
    return jnp.clip((length - offset + query_block - 1) // query_block, 0, blocks)
