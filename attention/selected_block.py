"""One query block of two-stage attention: stage 1, stage 2, gather, exact softmax.

With a fixed budget both stages keep a number of keys. By mass they keep as few as hold a share of the weight: the
block's own neighbourhood and the sink are attended to anyway, so their exact weight tells how much the rest can weigh.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .blocks import MASKED, Visibility
from .compensation import BlockSums, SelectedKeys, compensate
from .exact import Head, Partial, normalise
from .keys import KeyView
from .logits import Logits
from .methods import RankingQueries
from .ops import cap, matmul_transposed, transposed_matmul
from .relative_bias import BiasTable, bias_tile
from .selection import (
    Forced,
    IndexTiles,
    block_importance,
    block_logits,
    block_weights,
    forced_members,
    largest_weight,
    leading,
    select,
    token_weights,
)

if TYPE_CHECKING:
    from .two_stage import TwoStage

RESCORED = 2048
"""Up to so many candidates, in tokens, stage 2 by mass looks at one by one. More there are only where the weight is
spread over all of them: it attends to them all."""


class Selecting(NamedTuple):
    """What the query blocks of one head select from, and how.

    Attributes:
        config: the strategy.
        keys: with the method's index, padded to whole tiles of stage 1.
        head: a slot and one of its KV heads.
        logits: of that head.
        sums: what compensation needs, or None.
    """

    config: "TwoStage"
    keys: KeyView
    head: Head
    logits: Logits
    sums: BlockSums | None

    @property
    def blocks(self) -> int:
        """Key blocks of the memory."""
        return self.keys.capacity // self.config.key_block


class QueryBlock(NamedTuple):
    """The queries of one block, as both stages know them, and what they see.

    `present` are those of the call and of their row: other queries fill up the block, and choose nothing.
    """

    query: Float[Array, "lanes head_dim"]
    present: Bool[Array, " lanes"]
    ranking: RankingQueries
    visibility: Visibility
    offset: Float[Array, " lanes"] | None = None
    """What stage 1's estimates lack of each query's logits, where that is asked: by mass."""


class Candidates(NamedTuple):
    """The tokens of some key blocks, and the logits that the queries of a block give them, MASKED where unseen."""

    position: Int[Array, " tokens"]
    key: Float[Array, "tokens head_dim"]
    logits: Float[Array, "tokens lanes"]

    @property
    def visible(self) -> Bool[Array, " tokens"]:
        """Which tokens a query sees."""
        return jnp.any(self.logits > MASKED, axis=1)


def selected_block(how: Selecting, block: QueryBlock) -> Partial:
    """Attention of one query block over its selection."""
    config = how.config
    forced = forced_members(block.visibility, config.sink, config.local, config.key_block)
    if config.mass:
        return _by_mass(how, block, forced)
    chosen, visible = _best_blocks(how, block, forced)
    candidates = _candidates(how, block, chosen, visible)
    taken, kept = select(
        largest_weight(candidates.logits),
        forced.covers(candidates.position),
        candidates.visible,
        min(config.most_keys, candidates.position.size),
    )
    return _attend(how, block, candidates, taken, kept)


def _by_mass(how: Selecting, block: QueryBlock, forced: Forced) -> Partial:
    """Attention to as few keys as hold the mass. Each stage may leave out half of what the mass leaves."""
    config, length = how.config, how.config.key_block
    ranked, always, visible = _kinds_of_blocks(how, block.visibility, forced)
    near, near_visible = select(
        jnp.zeros(how.blocks), always, visible & always, min(how.blocks, config.most_forced_blocks)
    )
    near_logits = _candidates(how, block, near, near_visible).logits

    index = IndexTiles(how.keys, head=how.head, key_block=length)
    logits = block_logits(config.ranking, block.ranking, index, ranked, how.logits.softcap)
    assert block.offset is not None
    beside = (jax.nn.logsumexp(near_logits, axis=0) - block.offset)[block.ranking.lane]
    weights = block_weights(jnp.where(always[:, None], MASKED, logits), beside, block.ranking.present)
    most = min(how.blocks, config.most_keys // length)
    order, _ = select(weights.importance, always, visible, most)
    held = leading(weights.mean[order], jnp.sum(weights.mean) - config.left_out)
    count = jnp.maximum(jnp.maximum(held, jnp.sum(always & visible)), config.least_keys // length)
    count = jnp.minimum(count, jnp.sum(visible))

    def of_size(size: int) -> Partial:
        rising = jnp.sort(jnp.where(jnp.arange(size) < count, order[:size], how.blocks))
        kept = rising < how.blocks
        candidates = _candidates(how, block, jnp.where(kept, rising, 0), kept)
        return _attend(how, block, candidates, *_fewest(config, candidates, block, forced))

    sizes = _sizes(RESCORED // length, most)
    which = jnp.searchsorted(jnp.asarray(sizes), jnp.minimum(count, most))
    return lax.switch(which, [partial(of_size, size) for size in sizes])


def _sizes(unit: int, most: int) -> list[int]:
    """Numbers of candidate blocks that are compiled: of these the least that is enough is computed."""
    sizes, size = [], max(1, unit // 4)
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def _fewest(
    config: "TwoStage", candidates: Candidates, block: QueryBlock, forced: Forced
) -> tuple[Int[Array, " taken"], Bool[Array, " taken"]]:
    """Stage 2 by mass: which candidates are attended to; all of them where they are many."""
    tokens = candidates.position.size
    if tokens > RESCORED:
        return jnp.arange(tokens), candidates.visible
    weights = token_weights(candidates.logits, block.present)
    always = forced.covers(candidates.position)
    order, kept = select(weights.importance, always, candidates.visible, min(config.most_keys, tokens))
    mean = jnp.where(kept, weights.mean[order], 0.0)
    held = leading(mean, jnp.sum(weights.mean) * (1 - config.left_out))
    count = jnp.maximum(jnp.maximum(held, jnp.sum(always & candidates.visible)), config.least_keys)
    return order, kept & (jnp.arange(order.size) < count)


def _attend(
    how: Selecting,
    block: QueryBlock,
    candidates: Candidates,
    taken: Int[Array, " taken"],
    kept: Bool[Array, " taken"],
) -> Partial:
    """The exact softmax over the candidates that are taken and kept."""
    position = candidates.position[taken]
    # What nobody sees may hold NaN, which a weight of 0 does not make 0: the row's first value is there in its place.
    value = how.keys.value_rows(*how.head, jnp.where(kept, position, 0), block.query.dtype)[:, 0]
    part = softmax_over(jnp.where(kept[:, None], candidates.logits[taken], MASKED), value)
    if how.sums is None:
        return part
    selection = SelectedKeys(position, kept, candidates.key[taken], value)
    return compensate(part, block.query, selection, how.sums.of_head(how.keys, how.head), block.visibility, how.logits)


def _candidates(
    how: Selecting, block: QueryBlock, number: Int[Array, " blocks"], visible: Bool[Array, " blocks"]
) -> Candidates:
    """The tokens of some key blocks, by their numbers, of which some are visible."""
    length, logits_of, visibility = how.config.key_block, how.logits, block.visibility
    query = block.query
    position = (number[:, None] * length + jnp.arange(length, dtype=jnp.int32)).reshape(-1)
    key = how.keys.key_rows(*how.head, number * length, query.dtype, length).reshape(-1, query.shape[1])
    seen = visibility.mask(position).T & jnp.repeat(visible, length)[:, None] & block.present
    logits = cap(matmul_transposed(key, query) * logits_of.scale, logits_of.softcap)
    if logits_of.bias is not None:
        logits += _bias_of_blocks(logits_of.bias, visibility.position[0], number * length, query.shape[0], length)
    return Candidates(position, key, jnp.where(seen, logits, MASKED))


def _bias_of_blocks(
    table: BiasTable, query_start: Int[Array, ""], key_starts: Int[Array, " blocks"], lanes: int, length: int
) -> Float[Array, "keys lanes"]:
    """The bias of a query block at the tokens of some key blocks."""
    queries = lanes // table.shape[0]
    tiles = jax.vmap(lambda start: bias_tile(table, query_start, start, queries, length))(key_starts)
    return tiles.transpose(0, 2, 1).reshape(-1, lanes)


def _kinds_of_blocks(
    how: Selecting, visibility: Visibility, forced: Forced
) -> tuple[Int[Array, ""], Bool[Array, " blocks"], Bool[Array, " blocks"]]:
    """How many blocks every query sees whole, which of all are attended to anyway, and which are visible.

    Only whole blocks are ranked; one at the edge of what is visible is forced.
    """
    length = how.config.key_block
    ranked = (forced.start if visibility.causal else visibility.length) // length
    number = jnp.arange(how.blocks, dtype=jnp.int32)
    always = forced.covers(number * length) | (number >= ranked)
    return ranked, always, number * length < visibility.end()


def _best_blocks(
    how: Selecting, block: QueryBlock, forced: Forced
) -> tuple[Int[Array, " candidate_blocks"], Bool[Array, " candidate_blocks"]]:
    """Stage 1 with a fixed budget: the key blocks whose tokens stage 2 looks at, and whether each is visible."""
    config = how.config
    ranked, always, visible = _kinds_of_blocks(how, block.visibility, forced)
    index = IndexTiles(how.keys, head=how.head, key_block=config.key_block)
    importance = block_importance(config.ranking, block.ranking, index, ranked, how.logits.softcap)
    chosen, _ = select(importance, always, visible, min(how.blocks, config.candidate_blocks))
    # Rising, so that of tokens that stage 2 finds equal it takes the first ones.
    chosen = jnp.sort(chosen)
    return chosen, visible[chosen]


def softmax_over(logits: Float[Array, "keys lanes"], value: Float[Array, "keys value_dim"]) -> Partial:
    """The exact softmax over gathered keys and its product with their values."""
    largest = jnp.max(logits, axis=0)
    weights = jnp.where(logits > MASKED, jnp.exp(logits - largest), 0.0)
    return normalise(transposed_matmul(weights.astype(value.dtype), value), largest, jnp.sum(weights, axis=0))
