"""Which keys a query block attends to: stage 1 ranks key blocks, stage 2 ranks their tokens by exact logits.

Importance means the largest softmax weight that any query of the block gives to a key or key block. It is normalised
per query first, because the largest raw logit would favour the queries with the largest norm.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .blocks import MASKED, Visibility
from .methods import Method, RankingQueries
from .ops import cap

FORCED = float(jnp.finfo(jnp.float32).max)
"""The importance of what is always selected."""


class Forced(NamedTuple):
    """The parts of a sequence that a query block always selects, as positions: [0, sink_end) and [start, end)."""

    sink_end: Int[Array, ""]
    start: Int[Array, ""]
    end: Int[Array, ""]

    def covers(self, position: Int[Array, " n"]) -> Bool[Array, " n"]:
        """Whether each position is in one of the two parts."""
        return (position < self.sink_end) | ((position >= self.start) & (position < self.end))


def forced_members(visibility: Visibility, sink: int, local: int, key_block: int) -> Forced:
    """The sink, the query block itself and its neighbours, in whole key blocks."""
    first, last = jnp.min(visibility.position), jnp.max(visibility.position)
    start = jnp.maximum(first - local, 0) // key_block * key_block
    end = visibility.end() if visibility.causal else jnp.minimum(last + 1 + local, visibility.length)
    return Forced(jnp.asarray(-(-sink // key_block) * key_block, jnp.int32), start, end)


def block_importance(
    method: Method,
    ranking: RankingQueries,
    index_tile: Callable[[Int[Array, ""]], Mapping[str, Shaped[Array, "tile entries ..."]]],
    visible_blocks: Int[Array, ""],
    blocks: int,
    tile: int,
    softcap: float | None,
) -> Float[Array, " blocks"]:
    """Stage 1: the importance of the first `visible_blocks` key blocks, `MASKED` for the rest.

    A cap changes no query's order of the blocks, but how much of its weight it gives to the first of them.

    Args:
        method: the rule.
        ranking: the queries of one query block.
        index_tile: reads the index of `tile` key blocks, by the tile's number. Tiles are read up to the last visible
            block, so that the cost follows what is visible.
        visible_blocks: that every query sees whole.
        blocks: all of them, a multiple of `tile`.
        tile: key blocks that are scored at a time.
        softcap: of the logits.
    """

    def score(index: Int[Array, ""], logits: Array) -> Array:
        products = cap(method.block_products(ranking.features, index_tile(index)) * ranking.scale, softcap)
        return lax.dynamic_update_slice(logits, products, (index * tile, 0))

    tiles = (visible_blocks + tile - 1) // tile
    logits = lax.fori_loop(0, tiles, score, jnp.full((blocks, ranking.features.shape[0]), MASKED))
    visible = jnp.arange(blocks) < visible_blocks
    return largest_weight(jnp.where(visible[:, None] & ranking.present, logits, MASKED))


def largest_weight(logits: Float[Array, "keys queries"]) -> Float[Array, " keys"]:
    """The log of the largest softmax weight that any query gives to each key; `MASKED` where no query sees the key."""
    normaliser = jax.nn.logsumexp(logits, axis=0)
    return jnp.max(jnp.where(logits > MASKED, logits - normaliser, MASKED), axis=1)


def select(
    importance: Float[Array, " n"], forced: Bool[Array, " n"], visible: Bool[Array, " n"], count: int
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """The `count` most important of the visible, forced ones first, ties to the lower index.

    Returns:
        Indices, and whether each is visible: where fewer than `count` are, the rest is not.
    """
    importance = jnp.where(visible, jnp.where(forced, FORCED, importance), MASKED)
    chosen = lax.top_k(importance, count)[1]
    return chosen, visible[chosen]
