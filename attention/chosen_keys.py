"""Attention of one new token to chosen keys by an exact softmax, and the mean of all values that may stand in for the
rest.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from .blocks import MASKED
from .compensation import MEAN_BLOCK
from .exact import Head, Partial
from .keys import KeyView
from .ops import cap, matmul_transposed
from .selected_block import softmax_over

VALUE_SUM = "value_sum"
"""The field that `mean_value` needs: the sum of the values of every `MEAN_BLOCK` tokens."""
_LEAST_SHARE = 1e-30
"""In place of an estimated weight of 0, by which something is divided."""


class Lane(NamedTuple):
    """The new token of one row, at one KV head.

    Attributes:
        query: of the head's group.
        head: a slot and one of its KV heads.
        seen: keys that the token sees; its own is the last. 0 for an idle row.
        start: where its neighbourhood begins.
    """

    query: Float[Array, "group head_dim"]
    head: Head
    seen: Int[Array, ""]
    start: Int[Array, ""]


class ChosenKeys(NamedTuple):
    """Makes logits of, and attends to, runs of keys.

    Attributes:
        keys: of the call.
        lane: whose keys.
        scale: factor of query . key.
        softcap: cap of the logits, or None.
    """

    keys: KeyView
    lane: Lane
    scale: float
    softcap: float | None

    def logits(self, start: Int[Array, " runs"], size: int) -> Float32[Array, "keys group"]:
        """Of the keys in runs of `size` tokens, each from a multiple of it."""
        query = self.lane.query
        key = self.keys.key_rows(*self.lane.head, start, query.dtype, size).reshape(-1, query.shape[1])
        return cap(matmul_transposed(key, query) * self.scale, self.softcap)

    def attend(
        self,
        start: Int[Array, " runs"],
        size: int,
        counted: Bool[Array, " runs"],
        raised: Float32[Array, ""] | float = 0.0,
    ) -> Partial:
        """Attention to the runs that are counted, as far as the token sees them, with logits raised by a number."""
        start = jnp.where(counted, start, 0)
        position = start[:, None] + jnp.arange(size, dtype=jnp.int32)
        seen = (counted[:, None] & (position < self.lane.seen)).reshape(-1, 1)
        value = self.keys.value_rows(*self.lane.head, start, self.lane.query.dtype, size).reshape(seen.shape[0], -1)
        # What is not seen may hold NaN, which a weight of 0 does not make 0.
        return softmax_over(jnp.where(seen, self.logits(start, size) + raised, MASKED), jnp.where(seen, value, 0))


def mean_value(keys: KeyView, lane: Lane) -> Float32[Array, " value_dim"]:
    """The mean of all values that a token sees, from the sums of whole blocks and the tokens of the last one."""
    sums = keys.fields[VALUE_SUM]
    blocks = keys.capacity // MEAN_BLOCK
    whole = lane.seen // MEAN_BLOCK
    of_blocks = keys.run(sums, *lane.head, jnp.int32(0), blocks)
    last = jnp.minimum(whole, blocks - 1) * MEAN_BLOCK
    rest = keys.value_rows(*lane.head, last[None], jnp.float32, MEAN_BLOCK)[0].astype(jnp.float32)
    # Memory past the end, and sums over it, may be NaN.
    of_blocks = jnp.where((jnp.arange(blocks) < whole)[:, None], of_blocks, 0.0)
    position = whole * MEAN_BLOCK + jnp.arange(MEAN_BLOCK)
    rest = jnp.where((position < lane.seen)[:, None], rest, 0.0)
    return (jnp.sum(of_blocks, axis=0) + jnp.sum(rest, axis=0)) / lane.seen


def reallocated(
    whole: Partial, chosen: Partial, share: Float32[Array, " group"], mean: Float32[Array, " value_dim"]
) -> Float32[Array, "group value_dim"]:
    """SparQ's alpha * output + (1 - alpha) * mean value, alpha the share of all weight that is attended to.

    The exact weight of the chosen blocks is to that of the blocks left out as `share` is to `1 - share`: of a method's
    estimates only the ratios count, and what needs no estimate, the neighbourhood, has none.

    Args:
        whole: attention to chosen blocks and neighbourhood.
        chosen: to chosen blocks only.
        share: of the estimated weight of all ranked blocks, what the chosen ones hold.
        mean: of all values.
    """
    left = jnp.exp(chosen.lse - whole.lse) * (1 - share) / jnp.maximum(share, _LEAST_SHARE)
    alpha = (1 / (1 + left))[:, None]
    return alpha * whole.output + (1 - alpha) * mean
