"""Two-stage top-k attention: rank key blocks, rank the tokens of the best exactly, gather, exact softmax.

Query blocks that see no more keys than the budget or the crossover, and the last block of a prompt, are attended
exactly.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from . import custom_calls
from .blocks import (
    EXACT_KEY_BLOCK,
    MASKED,
    Visibility,
    join_queries,
    next_power_of_two,
    pad_axis,
    seen_lengths,
    split_queries,
    valid_blocks,
    visibility_of_block,
)
from .compensation import MEAN_BLOCK, BlockSums, Selection, block_sums, compensate
from .config import TwoStage, method_of
from .distance import DistanceTable, distance_tile, table_of_heads
from .exact import Partial, exact_block, normalise
from .methods import LowRank, RankingQueries, project_keys, project_queries, required
from .ops import cap, check_logit_options, matmul_transposed, transposed_matmul
from .selection import Forced, block_importance, forced_members, largest_weight, select

_STAGE_1_TILE = 4096
"""Keys that stage 1 scores at a time: with 64 queries a megabyte of scores, which stays in the cache."""


class PreparedKeys(NamedTuple):
    """The keys and values of every head, padded, with what stage 1 and the compensation keep of them."""

    key: Float[Array, "batch kv_heads keys head_dim"]
    value: Float[Array, "batch kv_heads keys value_dim"]
    summary: Shaped[Array, "heads blocks ..."]
    sums: BlockSums | None


def two_stage_attention(
    config: TwoStage,
    query: Float[Array, "batch query_heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    *,
    offset: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    distance_bias: Float[Array, "query_heads distances"] | None = None,
    basis: Float[Array, "kv_heads 2 head_dim rank"] | None = None,
    projected: Int8[Array, "batch kv_heads keys padded_rank"] | None = None,
) -> Float[Array, "batch query_heads queries value_dim"]:
    """Attention over the `config.budget` keys that each query block finds most important.

    Arguments and result are those of `exact_attention`; `basis` holds the projections that `low_rank` needs, and
    `projected` what `project_keys` made of the keys, if the caller has it. Stage 1 ranks without `distance_bias`; the
    selection among its candidates and the softmax have it.

    Raises:
        ValueError: a `distance_bias` with compensation, whose mean keys have no distance; or as `exact_attention`.
    """
    check_logit_options(scale, softcap)
    if distance_bias is not None and config.compensation != "none":
        raise ValueError(
            f"compensation is {config.compensation!r}, which cannot go with a distance_bias, expected 'none'"
        )
    batch, kv_heads, keys, head_dim = key.shape
    queries = query.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    lengths = jnp.minimum(lengths, keys)
    seen = seen_lengths(lengths, offset, queries, keys, causal)
    blocked = split_queries(query, kv_heads, config.query_block)
    heads, blocks, rows = blocked.shape[:3]
    bases = None if basis is None else jnp.tile(basis, (batch, 1, 1, 1))
    if distance_bias is None and runs_in_kernel(config, query, key, value):
        return custom_calls.two_stage(
            config,
            *(query, key, value),
            project_keys(key, required(basis)) if projected is None else projected,
            project_queries(blocked, required(bases)),
            offset=offset,
            lengths=lengths,
            causal=causal,
            scale=scale,
            softcap=softcap,
        )[0]
    index = jnp.arange(blocks)[:, None] * config.query_block + jnp.arange(rows) % config.query_block
    present = index < jnp.repeat(seen - offset, kv_heads)[:, None, None]
    ranking = method_of(config).ranking_queries(blocked, present, bases)
    ranking = ranking._replace(scale=ranking.scale * scale)
    prepared = prepare_keys(config, key, value, bases, projected)
    tables = table_of_heads(distance_bias, kv_heads)
    exact_key_block = min(EXACT_KEY_BLOCK, prepared.key.shape[2])

    def attend_head(head: Int[Array, ""], out: Array) -> Array:
        start, length, end = (x[head // kv_heads] for x in (offset, lengths, seen))
        table = None if tables is None else tables[head % kv_heads]
        count = valid_blocks(start, length, blocks, config.query_block)
        first, last = selected_blocks(config, start, length, count, causal)

        def selected(block: Int[Array, ""], out: Array) -> Array:
            visibility = visibility_of_block(block, start, end, causal, rows, config.query_block)
            ranks = RankingQueries(*(x[head, block] for x in ranking))
            part = selected_block(
                config, blocked[head, block], ranks, prepared, head, visibility, scale, softcap, table
            )
            return out.at[head, block].set(part.output.astype(out.dtype))

        def exact(index: Int[Array, ""], out: Array) -> Array:
            # The exact blocks stand before and behind the selected ones: one loop serves both.
            block = jnp.where(index < first, index, last + index - first)
            visibility = visibility_of_block(block, start, end, causal, rows, config.query_block)
            part = exact_block(
                *(blocked[head, block], prepared.key, prepared.value, head, visibility, scale, softcap),
                exact_key_block,
                table=table,
            )
            return out.at[head, block].set(part.output.astype(out.dtype))

        out = lax.fori_loop(first, last, selected, out)
        return lax.fori_loop(0, first + count - last, exact, out)

    nothing = jnp.zeros((heads, blocks, rows, value.shape[-1]), query.dtype)
    out = lax.fori_loop(0, heads, attend_head, nothing)
    return join_queries(out, batch, queries, config.query_block)


def runs_in_kernel(config: TwoStage, query: Array, key: Array, value: Array) -> bool:
    """Whether these arrays are attended to by the native kernel, which has the method `low_rank` only."""
    made_for = isinstance(config.method, LowRank) and config.compensation == "none"
    return made_for and custom_calls.available(query, key, value)


def prepare_keys(
    config: TwoStage,
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    bases: Float[Array, "heads 2 head_dim rank"] | None,
    projected: Int8[Array, "batch kv_heads keys padded_rank"] | None,
) -> PreparedKeys:
    """Pads keys to whole stage-1 tiles and summarises their blocks."""
    multiple = max(min(_STAGE_1_TILE, next_power_of_two(key.shape[2])), config.key_block, MEAN_BLOCK)
    key, value = (pad_axis(x, 2, multiple) for x in (key, value))
    batch, kv_heads, length, head_dim = key.shape
    blocked = (batch * kv_heads, length // config.key_block, config.key_block)
    if projected is None:
        summary = method_of(config).summarize(key.reshape(*blocked, head_dim), bases)
    else:
        summary = pad_axis(projected, 2, multiple).reshape(*blocked, -1)
    sums = block_sums(key, value) if config.compensation == "block_mean" else None
    return PreparedKeys(key, value, summary, sums)


def selected_blocks(
    config: TwoStage, offset: Int[Array, ""], length: Int[Array, ""], count: Int[Array, ""], causal: bool
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The query blocks [first, last) among the `count` of a call that attend to a selection; the others attend exactly.

    Blocks before `first` see no more than `config.exact_keys`. Blocks from `last` on hold one of the last `query_block`
    tokens of the row.
    """
    size = config.query_block
    few_keys = jnp.clip((config.exact_keys - offset) // size, 0, count) if causal else 0
    first = jnp.where(length <= config.exact_keys, count, few_keys)
    last = jnp.clip((length - size - offset) // size, 0, count) if config.exact_last_block else count
    return first, jnp.maximum(first, last)


def any_selected(
    config: TwoStage, queries: int, offset: Int[Array, " batch"], lengths: Int[Array, " batch"], causal: bool
) -> Bool[Array, ""]:
    """Whether a query block of any row attends to a selection, among the `queries` tokens of a call."""
    size = config.query_block

    def selects(start: Int[Array, ""], length: Int[Array, ""]) -> Bool[Array, ""]:
        count = valid_blocks(start, length, -(-queries // size), size)
        first, last = selected_blocks(config, start, length, count, causal)
        return first < last

    return jnp.any(jax.vmap(selects)(offset, lengths))


def selected_block(
    config: TwoStage,
    query: Float[Array, "rows head_dim"],
    ranking: RankingQueries,
    keys: PreparedKeys,
    head: Int[Array, ""],
    visibility: Visibility,
    scale: float,
    softcap: float | None,
    table: DistanceTable | None = None,
) -> Partial:
    """Attention of one query block over its selection: stage 1, stage 2, gather, exact softmax."""
    length, head_dim = keys.key.shape[2:]
    block_length = config.key_block
    forced = forced_members(visibility, config.sink, config.local, block_length)

    block, block_visible = _stage_1(config, ranking, keys, head, visibility, forced, softcap)
    position = (block[:, None] * block_length + jnp.arange(block_length, dtype=jnp.int32)).reshape(-1)
    candidate = keys.key.reshape(-1, block_length, head_dim)[head * (length // block_length) + block]
    candidate = candidate.reshape(-1, head_dim)
    visible = visibility.mask(position).T & jnp.repeat(block_visible, block_length)[:, None]
    visible &= visibility.position < visibility.length  # Other queries fill up the block: they choose nothing.
    logits = cap(matmul_transposed(candidate, query) * scale, softcap)
    if table is not None:
        logits += _distances_to_blocks(
            table, visibility.position[0], block * block_length, query.shape[0], block_length
        )
    logits = jnp.where(visible, logits, MASKED)

    chosen, chosen_visible = select(
        largest_weight(logits), forced.covers(position), jnp.any(visible, axis=1), min(config.budget, position.size)
    )
    # What nobody sees may hold NaN, which a weight of 0 does not make 0: the row's first value is there in its place.
    value = keys.value.reshape(-1, keys.value.shape[3])[head * length + jnp.where(chosen_visible, position[chosen], 0)]
    part = _softmax(jnp.where(chosen_visible[:, None], logits[chosen], MASKED), value)
    if keys.sums is None:
        return part
    selection = Selection(position[chosen], chosen_visible, candidate[chosen], value)
    return compensate(part, query, selection, keys.sums, head, visibility, scale, softcap)


def _distances_to_blocks(
    table: DistanceTable, query_start: Int[Array, ""], key_starts: Int[Array, " blocks"], rows: int, block_length: int
) -> Float[Array, "keys rows"]:
    """The bias of a query block at the tokens of some key blocks."""
    queries = rows // table.shape[0]
    tiles = jax.vmap(lambda start: distance_tile(table, query_start, start, queries, block_length))(key_starts)
    return tiles.transpose(0, 2, 1).reshape(-1, rows)


def _stage_1(
    config: TwoStage,
    ranking: RankingQueries,
    keys: PreparedKeys,
    head: Int[Array, ""],
    visibility: Visibility,
    forced: Forced,
    softcap: float | None,
) -> tuple[Int[Array, " candidate_blocks"], Bool[Array, " candidate_blocks"]]:
    """The key blocks whose tokens stage 2 looks at, and whether each is visible."""
    block_length, blocks = config.key_block, keys.summary.shape[1]
    # Only blocks that every query sees whole are ranked; a block at the edge of what is visible is forced.
    ranked = (forced.start if visibility.causal else visibility.length) // block_length
    tile = min(blocks, _STAGE_1_TILE // block_length)
    importance = block_importance(method_of(config), *ranking, keys.summary, head, ranked, tile, softcap)
    block = jnp.arange(blocks, dtype=jnp.int32)
    always = forced.covers(block * block_length) | (block >= ranked)
    visible = block * block_length < visibility.end()
    chosen, _ = select(importance, always, visible, min(blocks, config.candidate_blocks))
    # Rising, so that of tokens that stage 2 finds equal it takes the first ones.
    chosen = jnp.sort(chosen)
    return chosen, visible[chosen]


def _softmax(logits: Float[Array, "keys rows"], value: Float[Array, "keys value_dim"]) -> Partial:
    """The exact softmax over gathered keys and its product with their values."""
    largest = jnp.max(logits, axis=0)
    weights = jnp.where(logits > MASKED, jnp.exp(logits - largest), 0.0)
    return normalise(transposed_matmul(weights.astype(value.dtype), value), largest, jnp.sum(weights, axis=0))
