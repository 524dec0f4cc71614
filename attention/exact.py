"""Exact attention, block by block with an online softmax: no array grows with the square of the length.

The reference of two-stage attention, what short sequences use, and what every decoding step uses.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import custom_calls
from .blocks import (
    EXACT_KEY_BLOCK,
    EXACT_QUERY_BLOCK,
    MASKED,
    Visibility,
    head_tile,
    join_queries,
    next_power_of_two,
    pad_axis,
    seen_lengths,
    split_queries,
    valid_blocks,
    visibility_of_block,
)
from .distance import DistanceTable, distance_tile, table_of_heads
from .ops import cap, check_logit_options, matmul, matmul_transposed

Mask = Bool[Array, "#batch #query_heads queries keys"] | Float[Array, "#batch #query_heads queries keys"]


class Partial(NamedTuple):
    """Attention over a part of the keys, which merges with that over other parts.

    `output` is normalised over the part; `lse` is the log-sum-exp of its logits, `MASKED` where no key is visible.
    """

    output: Float[Array, "rows value_dim"]
    lse: Float[Array, " rows"]


def exact_attention(
    query: Float[Array, "batch query_heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    *,
    offset: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: Mask | None = None,
    distance_bias: Float[Array, "query_heads distances"] | None = None,
    query_block: int = EXACT_QUERY_BLOCK,
    key_block: int = EXACT_KEY_BLOCK,
) -> Float[Array, "batch query_heads queries value_dim"]:
    """softmax(query . key * scale) . value over the keys that each query sees.

    Args:
        query: queries, `query_heads` a multiple of `kv_heads`.
        key: keys.
        value: values.
        offset: absolute position of each row's first query, in tokens.
        lengths: valid tokens of each row; keys from there on are not seen, queries from there on give meaningless rows
            (without `causal` and `window`, queries may belong to another sequence, and all of them count).
        causal: whether a query sees only keys up to its own position.
        scale: factor of the logits, 1 / sqrt(head_dim) by default.
        softcap: cap of the logits (Gemma 2), applied after the scale and before the masks.
        window: sliding window, in tokens: a query at position i sees key j only if |i - j| < window, which with
            `causal` are the `window` keys up to its own. Only tiles of keys that reach into the window are visited, so
            that the cost grows with queries * window. None sees all. The `sliding_window` of transformers' causal
            models is this number; bidirectional ModernBERT has |i - j| <= local_attention // 2, a window of
            local_attention // 2 + 1.
        mask: further mask: True where a key takes part, or floats that are added to the logits.
        distance_bias: added to the logits, after the cap: the value at `reach + key position - query position` of the
            2 * reach + 1 that each head has, where distances beyond the reach count as the reach (T5's positions).
        query_block: queries computed together in XLA; the native kernel has blocks of its own.
        key_block: keys of one step of the online softmax in XLA.

    Returns:
        The attention output in the query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: `window` is not a number of tokens, `distance_bias` has an even number of distances, or `scale` or
            `softcap` is not a number that logits can be multiplied or capped with.
    """
    check_logit_options(scale, softcap)
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"window is {window}, expected 1 to 2**31 - 1 tokens, or None for no window")
    batch, kv_heads, keys, head_dim = key.shape
    query_heads, queries = query.shape[1:3]
    query_block = min(query_block, next_power_of_two(queries))
    key_block = min(key_block, next_power_of_two(keys))
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if mask is None and distance_bias is None and custom_calls.available(query, key, value):
        return custom_calls.exact(
            query,
            key,
            value,
            offset=offset,
            lengths=lengths,
            causal=causal,
            scale=scale,
            softcap=softcap,
            window=window,
        )[0]
    blocked = split_queries(query, kv_heads, query_block)
    key, value = (pad_axis(x, 2, key_block) for x in (key, value))
    bias = None if mask is None else _blocked_bias(mask, (batch, query_heads), kv_heads, query_block, key_block)
    tables = table_of_heads(distance_bias, kv_heads)
    heads, blocks, rows = blocked.shape[:3]
    lengths = seen_lengths(lengths, offset, queries, keys, causal)

    def attend_head(head: Int[Array, ""], out: Array) -> Array:
        first, length = offset[head // kv_heads], lengths[head // kv_heads]
        table = None if tables is None else tables[head % kv_heads]

        def attend_block(block: Int[Array, ""], out: Array) -> Array:
            visibility = visibility_of_block(block, first, length, causal, rows, query_block, window)
            tile = None if bias is None else bias[head, block]
            part = exact_block(
                blocked[head, block], key, value, head, visibility, scale, softcap, key_block, tile, table
            )
            return out.at[head, block].set(part.output.astype(out.dtype))

        # With neither mask queries may belong to another sequence than the keys, so all of them count.
        same_sequence = causal or window is not None
        count = valid_blocks(first, length, blocks, query_block) if same_sequence else blocks
        return lax.fori_loop(0, count, attend_block, out)

    nothing = jnp.zeros((heads, blocks, rows, value.shape[-1]), query.dtype)
    out = lax.fori_loop(0, heads, attend_head, nothing)
    return join_queries(out, batch, queries, query_block)


def exact_block(
    query: Float[Array, "rows head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    head: Int[Array, ""],
    visibility: Visibility,
    scale: float,
    softcap: float | None,
    key_block: int,
    bias: Float[Array, "rows keys"] | None = None,
    table: DistanceTable | None = None,
) -> Partial:
    """Exact attention of one query block, over key tiles from the first visible one to the last (FlashAttention's
    recurrence)."""
    rows = query.shape[0]
    end = visibility.end()

    def step(index: Int[Array, ""], state: tuple[Array, Array, Array], last: bool = False) -> tuple[Array, ...]:
        total, largest, weight = state
        start = index * key_block
        logits = cap(matmul_transposed(query, head_tile(key, head, start, key_block)) * scale, softcap)
        if table is not None:
            logits += distance_tile(table, visibility.position[0], start, rows // table.shape[0], key_block)
        if bias is not None:
            logits = jnp.maximum(logits + lax.dynamic_slice(bias, (0, start), (rows, key_block)), MASKED)
        position = start + jnp.arange(key_block, dtype=jnp.int32)
        logits = jnp.where(visibility.mask(position), logits, MASKED)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights = jnp.where(logits > MASKED, jnp.exp(logits - new_largest[:, None]), 0.0)
        decay = jnp.exp(largest - new_largest)
        values = head_tile(value, head, start, key_block)
        if last:
            # Past the end memory holds anything, and a weight of 0 does not make a NaN or an infinity 0.
            values = jnp.where((position < end)[:, None], values, 0)
        total = total * decay[:, None] + matmul(weights.astype(value.dtype), values)
        return total, new_largest, weight * decay + jnp.sum(weights, axis=1)

    # Only the last tile reaches past the end. The others' values are multiplied where they lie.
    first, last = visibility.start() // key_block, jnp.maximum(end - 1, 0) // key_block
    nothing = (jnp.zeros((rows, value.shape[3])), jnp.full((rows,), MASKED), jnp.zeros((rows,)))
    return normalise(*step(last, lax.fori_loop(first, last, step, nothing), last=True))


def normalise(
    total: Float[Array, "rows value_dim"], largest: Float[Array, " rows"], weight: Float[Array, " rows"]
) -> Partial:
    """Divides a sum of values by the weight it was summed with; 0 and `MASKED` for a row of no weight."""
    some = weight > 0
    weight = jnp.where(some, weight, 1.0)
    output = jnp.where(some[:, None], total / weight[:, None], 0.0)
    return Partial(output, jnp.where(some, largest + jnp.log(weight), MASKED))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of two disjoint parts."""
    largest = jnp.maximum(a.lse, b.lse)
    weight_a, weight_b = (jnp.where(x.lse > MASKED, jnp.exp(x.lse - largest), 0.0) for x in (a, b))
    total = a.output * weight_a[:, None] + b.output * weight_b[:, None]
    return normalise(total, largest, weight_a + weight_b)


def _blocked_bias(
    mask: Array, heads: tuple[int, int], kv_heads: int, query_block: int, key_block: int
) -> Float[Array, "heads blocks rows keys"]:
    """A mask as additive floats, cut as the queries are."""
    bias = jnp.where(mask, 0.0, MASKED) if mask.dtype == jnp.bool_ else mask.astype(jnp.float32)
    bias = jnp.broadcast_to(jnp.maximum(bias, MASKED), (*heads, *mask.shape[2:]))
    return split_queries(pad_axis(bias, 3, key_block), kv_heads, query_block)
