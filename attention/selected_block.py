"""One query block of two-stage attention: stage 1, stage 2, gather, exact softmax."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .blocks import MASKED, Visibility
from .compensation import BlockSums, SelectedKeys, compensate
from .exact import Head, Partial, normalise
from .keys import KeyView
from .logits import Logits
from .methods import RankingQueries
from .ops import cap, matmul_transposed, transposed_matmul
from .relative_bias import BiasTable, bias_tile
from .selection import Forced, IndexTiles, block_importance, forced_members, largest_weight, select

if TYPE_CHECKING:
    from .two_stage import TwoStage


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


def selected_block(
    how: Selecting, query: Float[Array, "lanes head_dim"], ranking: RankingQueries, visibility: Visibility
) -> Partial:
    """Attention of one query block over its selection."""
    config, keys, head, logits_of = how.config, how.keys, how.head, how.logits
    length = config.key_block
    forced = forced_members(visibility, config.sink, config.local, length)

    block, block_visible = _stage_1(how, ranking, visibility, forced)
    position = (block[:, None] * length + jnp.arange(length, dtype=jnp.int32)).reshape(-1)
    candidate = keys.key_rows(*head, block * length, query.dtype, length).reshape(-1, query.shape[1])
    visible = visibility.mask(position).T & jnp.repeat(block_visible, length)[:, None]
    visible &= visibility.position < visibility.length  # Other queries fill up the block: they choose nothing.
    logits = cap(matmul_transposed(candidate, query) * logits_of.scale, logits_of.softcap)
    if logits_of.bias is not None:
        logits += _bias_of_blocks(logits_of.bias, visibility.position[0], block * length, query.shape[0], length)
    logits = jnp.where(visible, logits, MASKED)

    chosen, chosen_visible = select(
        largest_weight(logits), forced.covers(position), jnp.any(visible, axis=1), min(config.budget, position.size)
    )
    # What nobody sees may hold NaN, which a weight of 0 does not make 0: the row's first value is there in its place.
    value = keys.value_rows(*head, jnp.where(chosen_visible, position[chosen], 0), query.dtype)[:, 0]
    part = softmax_over(jnp.where(chosen_visible[:, None], logits[chosen], MASKED), value)
    if how.sums is None:
        return part
    selection = SelectedKeys(position[chosen], chosen_visible, candidate[chosen], value)
    return compensate(part, query, selection, how.sums.of_head(keys, head), visibility, logits_of)


def _bias_of_blocks(
    table: BiasTable, query_start: Int[Array, ""], key_starts: Int[Array, " blocks"], lanes: int, length: int
) -> Float[Array, "keys lanes"]:
    """The bias of a query block at the tokens of some key blocks."""
    queries = lanes // table.shape[0]
    tiles = jax.vmap(lambda start: bias_tile(table, query_start, start, queries, length))(key_starts)
    return tiles.transpose(0, 2, 1).reshape(-1, lanes)


def _stage_1(
    how: Selecting, ranking: RankingQueries, visibility: Visibility, forced: Forced
) -> tuple[Int[Array, " candidate_blocks"], Bool[Array, " candidate_blocks"]]:
    """The key blocks whose tokens stage 2 looks at, and whether each is visible."""
    config, keys = how.config, how.keys
    length = config.key_block
    blocks = keys.capacity // length
    # Only blocks that every query sees whole are ranked; a block at the edge of what is visible is forced.
    ranked = (forced.start if visibility.causal else visibility.length) // length
    index = IndexTiles(keys, head=how.head, key_block=length)
    importance = block_importance(config.ranking, ranking, index, ranked, how.logits.softcap)
    block = jnp.arange(blocks, dtype=jnp.int32)
    always = forced.covers(block * length) | (block >= ranked)
    visible = block * length < visibility.end()
    chosen, _ = select(importance, always, visible, min(blocks, config.candidate_blocks))
    # Rising, so that of tokens that stage 2 finds equal it takes the first ones.
    chosen = jnp.sort(chosen)
    return chosen, visible[chosen]


def softmax_over(logits: Float[Array, "keys lanes"], value: Float[Array, "keys value_dim"]) -> Partial:
    """The exact softmax over gathered keys and its product with their values."""
    largest = jnp.max(logits, axis=0)
    weights = jnp.where(logits > MASKED, jnp.exp(logits - largest), 0.0)
    return normalise(transposed_matmul(weights.astype(value.dtype), value), largest, jnp.sum(weights, axis=0))
