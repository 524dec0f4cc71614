"""Exact attention, block by block with an online softmax: no array grows with the square of the length.

The reference of two-stage attention, what short sequences use, and what every decoding step uses.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import custom_calls
from .blocks import (
    EXACT_KEY_BLOCK,
    EXACT_QUERY_BLOCK,
    MASKED,
    Visibility,
    join_queries,
    next_power_of_two,
    seen_lengths,
    split_queries,
    valid_blocks,
    visibility_of_block,
)
from .keys import KeyView
from .logits import Logits
from .ops import matmul
from .strategy import Attended, Attention, Call, check_power_of_two

Head = tuple[Int[Array, ""], Int[Array, ""]]
"""A slot and one of its KV heads."""

_NO_BIAS = "the kernels have no relative position bias"


class Partial(NamedTuple):
    """Attention over a part of the keys, which merges with that over other parts.

    `output` is normalised over the part; `lse` is the log-sum-exp of its logits, `MASKED` where no key is visible.
    """

    output: Float[Array, "lanes value_dim"]
    lse: Float[Array, " lanes"]


@dataclass(frozen=True)
class Exact(Attention):
    """Exact attention, computed block by block without an [n, n] array.

    Attributes:
        query_block: number of queries that XLA computes together; the native kernel chooses its own.
        key_block: number of keys per step of the online softmax in XLA.
    """

    kind: ClassVar[str] = "exact"

    query_block: int = EXACT_QUERY_BLOCK
    key_block: int = EXACT_KEY_BLOCK

    def __post_init__(self) -> None:
        check_power_of_two("query_block", self.query_block)
        check_power_of_two("key_block", self.key_block)

    def objection(self, call: Call) -> str | None:
        """Why no native kernel computes this."""
        return _NO_BIAS if call.mask.relative_bias is not None else custom_calls.objection(call)

    def attend_in_kernel(self, call: Call) -> Attended:
        return custom_calls.exact(call)[0]

    def attend(self, call: Call) -> Attended:
        query, keys, rows, mask, *_ = call
        kv_heads, queries = keys.kv_heads, query.shape[2]
        query_block = min(self.query_block, next_power_of_two(queries))
        key_block = min(self.key_block, next_power_of_two(keys.capacity))
        blocked = split_queries(query, kv_heads, query_block)
        seen = seen_lengths(rows, queries, keys.capacity, mask.causal)
        keys = keys.padded(key_block)
        logits = Logits.of(mask, query.shape[3], kv_heads)
        heads, blocks, lanes = blocked.shape[:3]

        def attend_head(head: Int[Array, ""], out: Array) -> Array:
            row, kv_head = head // kv_heads, head % kv_heads
            slot, first, length = rows.slot[row], rows.offset[row], seen[row]

            def attend_block(block: Int[Array, ""], out: Array) -> Array:
                visibility = visibility_of_block(block, first, length, mask, lanes, query_block)
                part = exact_block(
                    blocked[head, block], keys, (slot, kv_head), visibility, logits.of_head(kv_head), key_block
                )
                return out.at[head, block].set(part.output.astype(out.dtype))

            # With neither mask queries may belong to another sequence than the keys, so all of them count.
            same_sequence = mask.causal or mask.window is not None
            count = valid_blocks(first, length, blocks, query_block) if same_sequence else blocks
            return lax.fori_loop(0, count, attend_block, out)

        nothing = jnp.zeros((heads, blocks, lanes, keys.value.shape[-1]), query.dtype)
        out = lax.fori_loop(0, heads, attend_head, nothing)
        return join_queries(out, query.shape[0], queries, query_block)


def exact_block(
    query: Float[Array, "lanes head_dim"],
    keys: KeyView,
    head: Head,
    visibility: Visibility,
    logits: Logits,
    key_block: int,
) -> Partial:
    """Exact attention of one query block, over key tiles from the first visible one to the last (FlashAttention's
    recurrence)."""
    lanes = query.shape[0]
    end = visibility.end()

    def step(index: Int[Array, ""], state: tuple[Array, Array, Array], last: bool = False) -> tuple[Array, ...]:
        total, largest, weight = state
        start = index * key_block
        tile = logits(query, keys.key_run(*head, start, key_block, query.dtype), visibility.position[0], start)
        position = start + jnp.arange(key_block, dtype=jnp.int32)
        tile = jnp.where(visibility.mask(position), tile, MASKED)
        new_largest = jnp.maximum(largest, jnp.max(tile, axis=1))
        weights = jnp.where(tile > MASKED, jnp.exp(tile - new_largest[:, None]), 0.0)
        decay = jnp.exp(largest - new_largest)
        values = keys.value_run(*head, start, key_block, query.dtype)
        if last:
            # Past the end memory holds anything, and a weight of 0 does not make a NaN or an infinity 0.
            values = jnp.where((position < end)[:, None], values, 0)
        total = total * decay[:, None] + matmul(weights.astype(values.dtype), values)
        return total, new_largest, weight * decay + jnp.sum(weights, axis=1)

    # Only the last tile reaches past the end. The others' values are multiplied where they lie.
    first, last = visibility.start() // key_block, jnp.maximum(end - 1, 0) // key_block
    nothing = (jnp.zeros((lanes, keys.value.shape[3])), jnp.full((lanes,), MASKED), jnp.zeros((lanes,)))
    return normalise(*step(last, lax.fori_loop(first, last, step, nothing), last=True))


def normalise(
    total: Float[Array, "lanes value_dim"], largest: Float[Array, " rows"], weight: Float[Array, " lanes"]
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
