"""Which keys a query block attends to: stage 1 ranks key blocks, stage 2 ranks their tokens by exact logits.

With a fixed budget, importance means the largest softmax weight that any query of the block gives to a key or key
block; by mass, the geometric mean of this and of the queries' mean weight. Weights are normalised per query first,
because the largest raw logit would favour the queries with the largest norm.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .blocks import MASKED, Visibility, next_power_of_two
from .exact import Head
from .keys import LEAST_PAGE, KeyView
from .methods import Method, RankingQueries
from .ops import cap

FORCED = float(jnp.finfo(jnp.float32).max)
"""The importance of what is always selected."""
KEYS_WORTH = 2.0
"""A key block is estimated to weigh as much as so many of its best key."""
SUM_SLACK = 1e-5
"""What a sum of weights may lack of its target: more than rounding, so that all forms agree where it is reached."""
STAGE_1_TILE = 4096
"""Keys that stage 1 scores at a time: with 64 queries a megabyte of scores, which stays in the cache."""


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


class IndexTiles(NamedTuple):
    """The index of one head, read as many key blocks at a time as stage 1 scores together.

    Attributes:
        keys: with the method's index, as `stage_1_keys` pads them.
        head: a slot and one of its KV heads.
        key_block: tokens that are ranked together.
    """

    keys: KeyView
    head: Head
    key_block: int

    @property
    def blocks(self) -> int:
        """All key blocks, a multiple of `tile`."""
        return self.keys.capacity // self.key_block

    @property
    def tile(self) -> int:
        """Key blocks that are scored at a time."""
        return max(1, min(self.keys.capacity, STAGE_1_TILE) // self.key_block)

    def read(self, tile: Int[Array, ""], fields: Collection[str]) -> Mapping[str, Shaped[Array, "spans entries ..."]]:
        """The entries of a tile, by its number, in some fields."""

        def of_field(array: Array) -> Array:
            entries = self.tile * self.key_block * array.shape[2] // self.keys.page
            run = self.keys.run(array, *self.head, tile * entries, entries)
            return run.reshape(min(self.tile, entries), -1, *array.shape[3:])

        return {name: of_field(self.keys.fields[name]) for name in fields}


def stage_1_keys(keys: KeyView, key_block: int) -> KeyView:
    """The keys, padded to whole tiles of stage 1 and whole entries of every field."""
    return keys.padded(max(min(STAGE_1_TILE, next_power_of_two(keys.capacity)), key_block, LEAST_PAGE))


def block_importance(
    method: Method,
    ranking: RankingQueries,
    index: IndexTiles,
    visible_blocks: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, " blocks"]:
    """Stage 1: the importance of the first `visible_blocks` key blocks, `MASKED` for the rest.

    A cap changes no query's order of the blocks, but how much of its weight it gives to the first of them.

    Args:
        method: the rule.
        ranking: the queries of one query block.
        index: of its keys.
        visible_blocks: that every query sees whole.
        softcap: of the logits.
    """
    return largest_weight(block_logits(method, ranking, index, visible_blocks, softcap))


def block_logits(
    method: Method,
    ranking: RankingQueries,
    index: IndexTiles,
    visible_blocks: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, "blocks ranking_queries"]:
    """Estimated logits of the first `visible_blocks` key blocks; `MASKED` for the rest, and of queries that are none.

    Tiles are read up to the last visible block, so that the cost follows what is visible.
    """
    blocks, tile, queries = index.blocks, index.tile, ranking.features.shape[0]
    fields = method.fields(index.keys.key.shape[3], index.key_block)

    def score(number: Int[Array, ""], logits: Array) -> Array:
        products = method.block_products(ranking.features, index.read(number, fields))
        products = jnp.max(products.reshape(tile, -1, queries), axis=1)
        return lax.dynamic_update_slice(logits, cap(products * ranking.scale, softcap), (number * tile, 0))

    tiles = (visible_blocks + tile - 1) // tile
    logits = lax.fori_loop(0, tiles, score, jnp.full((blocks, queries), MASKED))
    visible = jnp.arange(blocks) < visible_blocks
    return jnp.where(visible[:, None] & ranking.present, logits, MASKED)


def largest_weight(logits: Float[Array, "keys queries"]) -> Float[Array, " keys"]:
    """The log of the largest softmax weight that any query gives to each key; `MASKED` where no query sees the key."""
    normaliser = jax.nn.logsumexp(logits, axis=0)
    return jnp.max(jnp.where(logits > MASKED, logits - normaliser, MASKED), axis=1)


class Weights(NamedTuple):
    """What the queries of a block give to each key or key block.

    Attributes:
        mean: the mean weight; over all keys it sums to 1.
        importance: what orders them: the mean times the largest weight that a query gives. A key that only one query
            needs has a small mean.
    """

    mean: Float[Array, " keys"]
    importance: Float[Array, " keys"]


def token_weights(logits: Float[Array, "keys queries"], present: Bool[Array, " queries"]) -> Weights:
    """Of keys with these logits, `MASKED` where unseen, among each other."""
    return _weights(logits, jax.nn.logsumexp(logits, axis=0), present)


def block_weights(
    logits: Float[Array, "blocks queries"], beside: Float[Array, " queries"], present: Bool[Array, " queries"]
) -> Weights:
    """Of key blocks whose largest logits are estimated, among each other and what lies beside them.

    Args:
        logits: the largest of each block; `MASKED` where there is none.
        beside: log-sum-exp of the keys that are attended to anyway.
        present: which queries count.
    """
    logits = jnp.where(logits > MASKED, logits + math.log(KEYS_WORTH), MASKED)
    return _weights(logits, jnp.logaddexp(jax.nn.logsumexp(logits, axis=0), beside), present)


def _weights(
    logits: Float[Array, "keys queries"], normaliser: Float[Array, " queries"], present: Bool[Array, " queries"]
) -> Weights:
    weights = jnp.where((logits > MASKED) & present, jnp.exp(logits - normaliser), 0.0)
    mean = jnp.sum(weights, axis=1) / jnp.maximum(jnp.sum(present), 1)
    return Weights(mean, mean * jnp.max(weights, axis=1))


def leading(weights: Float[Array, " n"], target: Float[Array, ""]) -> Int[Array, ""]:
    """How many of the first weights, which are at most 1 together, it takes to come within `SUM_SLACK` of a target."""
    return jnp.sum(jnp.cumsum(weights) - weights < target - SUM_SLACK)


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
