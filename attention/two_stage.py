"""Two-stage top-k attention: rank key blocks, rank the tokens of the best exactly, gather, exact softmax.

Query blocks that see no more keys than the budget or the crossover, and the last block of a prompt, are attended
exactly.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from . import custom_calls
from .blocks import (
    EXACT_KEY_BLOCK,
    Visibility,
    join_queries,
    seen_lengths,
    split_queries,
    valid_blocks,
    visibility_of_block,
)
from .compensation import block_sums
from .exact import Exact, exact_block
from .logits import Logits, scale_of
from .methods import Constants, LowRank, Method, RankingQueries, make_method
from .rows import Mask, Rows
from .selected_block import QueryBlock, Selecting, selected_block
from .selection import stage_1_keys
from .strategy import Attended, Attention, Call, Selective, check_power_of_two

MASS = 0.97
"""The mass of a budget that is a least and a most, if not said otherwise."""
LEAST_BY_MASS, MOST_BY_MASS = 512, 32768
"""The least and the most keys by mass, if not said otherwise."""
COMPENSATIONS = ("none", "block_mean")
"""What may stand in for the keys that are not selected."""


class SelectingBlocks(NamedTuple):
    """The query blocks [first, last) of each row of a call that attend to a selection; the others attend exactly."""

    first: Int[Array, " rows"]
    last: Int[Array, " rows"]


@dataclass(frozen=True)
class TwoStage(Selective):
    """Two-stage top-k attention: rank key blocks cheaply, rank their tokens exactly, attend to the best of these.

    The queries of a block and a query head share a selection: by `mass` as few keys as hold that share of the softmax
    weight, so that a head that looks at little reads little and one that looks everywhere reads much, or a `budget`
    that is the same for all. The first `sink` tokens, the query block itself and `local` tokens before it (and after it
    where attention is bidirectional) are always selected and count as budget.

    Attributes:
        method: the rule of stage 1: a name from the registry, or a method with its options, such as `LowRank(rank=16)`.
            By mass all queries of a block take part: `query_share` of `LowRank` becomes 1.
        mass: share of the softmax weight that the selected keys hold, on average over the queries of a block, as stage
            1 estimates and stage 2 measures it; 0 selects the whole budget. None for 0.97 if the budget is a pair, as
            it is by default, and else for 0.
        budget: number of keys that a query finally attends to; by mass the least and the most, or the most.
        query_block: number of queries of a head that share a selection. 0 chooses 128, and less for a budget below
            1024, because the queries of a block compete for it.
        key_block: number of keys that stage 1 ranks together.
        candidates: tokens that stage 1 leaves for stage 2, as a multiple of the budget; by mass it leaves as many as
            hold the mass.
        sink: number of tokens at the start of the sequence that are always selected.
        local: number of tokens next to the query block that are always selected; -1 chooses a quarter of
            `query_block`.
        exact_last_block: attend exactly for the last `query_block` tokens of each row, where the question of a prompt
            usually is.
        compensation: "block_mean" adds the keys that were not selected to the softmax, as one mean key per block.
        crossover: query blocks that see no more keys than this attend exactly, because that is faster. If it is below
            the budget (the least, by mass), that is used instead.
    """

    kind: ClassVar[str] = "two_stage"

    method: Method | str = "low_rank"
    budget: int | tuple[int, int] = field(
        default=(LEAST_BY_MASS, MOST_BY_MASS),
        metadata={"metavar": "KEYS or LEAST:MOST", "default": f"{LEAST_BY_MASS}:{MOST_BY_MASS}"},
    )
    mass: float | None = field(default=None, metadata={"default": f"{MASS}, and 0 if --budget is a number"})
    query_block: int = 0
    key_block: int = 8
    candidates: float = 1.5
    sink: int = 8
    local: int = -1
    exact_last_block: bool = True
    compensation: str = field(default="none", metadata={"choices": COMPENSATIONS})
    crossover: int = 0

    def __post_init__(self) -> None:
        self._check_budget()
        if isinstance(self.method, str):
            object.__setattr__(self, "method", make_method(self.method))
        if self.mass:
            if not self.ranking.estimates:
                raise ValueError(
                    f"mass is {self.mass}, but {self.ranking.name} only ranks keys, and estimates no weights: give "
                    "budget as a number"
                )
            object.__setattr__(self, "method", self.ranking.with_every_query)
        if self.query_block == 0:
            object.__setattr__(self, "query_block", _default_query_block(self.most_keys))
        if self.local == -1:
            object.__setattr__(self, "local", self.query_block // 4)
        check_power_of_two("query_block", self.query_block)
        check_power_of_two("key_block", self.key_block)
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}, expected a multiple of the budget that is at least 1")
        if self.sink < 0 or self.local < 0:
            raise ValueError(f"sink is {self.sink} and local is {self.local}, expected numbers of tokens >= 0")
        if self.compensation not in COMPENSATIONS:
            raise ValueError(f"compensation is {self.compensation!r}, expected one of: {', '.join(COMPENSATIONS)}")
        if self.crossover < 0:
            raise ValueError(f"crossover is {self.crossover}, expected a number of keys >= 0")
        if self.most_keys < self.most_forced_keys:
            raise ValueError(
                f"budget is {self.most_keys}, but sink, local and the query block itself may force "
                f"{self.most_forced_keys} keys: raise budget, or lower query_block, local, sink or key_block"
            )

    def _check_budget(self) -> None:
        if isinstance(self.budget, list):  # as JSON has a pair
            object.__setattr__(self, "budget", tuple(self.budget))
        if self.mass is None:
            object.__setattr__(self, "mass", MASS if isinstance(self.budget, tuple) else 0.0)
        assert self.mass is not None
        if not 0 <= self.mass < 1:
            raise ValueError(f"mass is {self.mass}, expected a share from 0, for a fixed budget, to below 1")
        if isinstance(self.budget, tuple) and not self.mass:
            raise ValueError(f"budget is {self.budget}, but only by mass has it a least and a most: give mass, or one")
        if not 1 <= self.least_keys <= self.most_keys:
            raise ValueError(
                f"budget is {self.budget}, expected at least 1 key, and a least that is not above the most"
            )

    @property
    def most_keys(self) -> int:
        """Keys, in tokens, that a query finally attends to at most."""
        return self.budget[1] if isinstance(self.budget, tuple) else self.budget

    @property
    def least_keys(self) -> int:
        """Keys that are selected where there are as many, even if fewer hold the mass."""
        if isinstance(self.budget, tuple):
            return self.budget[0]
        return min(self.budget, LEAST_BY_MASS) if self.mass else self.budget

    @property
    def most_forced_keys(self) -> int:
        """Keys that are selected whatever they weigh, at most: what is forced is rounded to whole key blocks at the
        sink and at both ends of the neighbourhood."""
        return self.sink + 2 * self.local + self.query_block + 3 * self.key_block

    @property
    def most_forced_blocks(self) -> int:
        """The same in key blocks, and one at the end of a row that is not whole."""
        return self.most_forced_keys // self.key_block + 1

    @property
    def left_out(self) -> float:
        """The share of the weight that each stage may leave out, by mass."""
        return (1 - (self.mass or 0)) / 2

    @property
    def candidate_blocks(self) -> int:
        """Key blocks that stage 1 leaves for stage 2, at most."""
        return -(-int(self.most_keys * (1 if self.mass else self.candidates)) // self.key_block)

    @property
    def exact_keys(self) -> int:
        """Keys, in tokens, up to which a query block attends to all that it sees."""
        return max(self.least_keys, self.crossover)

    def within(self, capacity: int, mask: Mask) -> Attention:
        """Exact attention, where the budget or the crossover covers every key, or the layer has a window: two-stage
        attention is for layers that see the whole sequence."""
        return Exact() if mask.window is not None or capacity <= self.exact_keys else self

    def objection(self, call: Call) -> str | None:
        """Why no native kernel computes this."""
        if call.mask.relative_bias is not None:
            return "the kernels have no relative position bias"
        if not isinstance(self.method, LowRank):
            return f"there is no kernel for the method {self.ranking.name}"
        if self.compensation != "none":
            return f"the kernel has no compensation by {self.compensation}"
        page = call.keys.page
        if call.keys.table is not None and self.key_block > page:
            return f"the kernel takes key blocks of at most a page, {page} tokens, and these have {self.key_block}"
        return custom_calls.objection(call)

    def selecting(self, rows: Rows, queries: int, causal: bool) -> SelectingBlocks:
        """Which of a call's query blocks select.

        Blocks before the first see no more than `exact_keys`. From the last on they hold one of the last `query_block`
        tokens of the row. Nothing else decides that, in XLA or in a kernel.
        """
        size = self.query_block
        count = valid_blocks(rows.offset, rows.length, -(-queries // size), size)
        few_keys = jnp.clip((self.exact_keys - rows.offset) // size, 0, count) if causal else 0
        first = jnp.where(rows.length <= self.exact_keys, count, few_keys)
        last = jnp.clip((rows.length - size - rows.offset) // size, 0, count) if self.exact_last_block else count
        return SelectingBlocks(first, jnp.maximum(first, last))

    def attend_in_kernel(self, call: Call) -> Attended:
        method = self.ranking
        assert isinstance(method, LowRank)
        query_rows, query_heads = call.query.shape[:2]
        call = _row_of_each_head(call)
        query, keys, rows, mask, constants, _ = call
        rows = rows._replace(length=jnp.minimum(rows.length, keys.capacity))
        keys = self.indexed(keys.padded(self.key_block), constants)
        blocked = split_queries(query, keys.kv_heads, self.query_block)
        ranking = method.projected_queries(blocked, constants), self._offsets(blocked, constants)
        selecting = self.selecting(rows.settled(), query.shape[2], mask.causal)
        attended = custom_calls.two_stage(self, call._replace(keys=keys, rows=rows), *ranking, selecting)[0]
        return _swapped(attended, query_rows, keys.kv_heads).reshape(query_rows, query_heads, *attended.shape[2:])

    def _offsets(
        self, query: Float[Array, "heads blocks lanes head_dim"], constants: Constants
    ) -> Float32[Array, "_ _ _"]:
        """What stage 1's estimates lack of each query's logits. With a fixed budget nobody asks: an empty array."""
        if not self.mass:
            return jnp.zeros((0, 0, 0), jnp.float32)
        return self.ranking.offsets(query, constants)

    def attend(self, call: Call) -> Attended:
        # A call whose query blocks all attend exactly, as in short prompts, pays for no index of the keys and has the
        # larger query blocks of exact attention.
        rows = call.rows._replace(length=jnp.minimum(call.rows.length, call.keys.capacity))
        call = call._replace(rows=rows)
        selecting = self.selecting(rows, call.query.shape[2], call.mask.causal)
        return lax.cond(
            jnp.any(selecting.first < selecting.last),
            lambda: two_stage_attention(self, call, selecting),
            lambda: Exact().attend(call),
        )


def _row_of_each_head(call: Call) -> Call:
    """The same call with a row for each query head that shares a KV head: the kernel lets the heads of a row share a
    selection."""
    group = call.query.shape[1] // call.keys.kv_heads
    query = _swapped(call.query, call.query.shape[0], group).reshape(-1, call.keys.kv_heads, *call.query.shape[2:])
    return call._replace(query=query, rows=Rows(*(jnp.repeat(x, group) for x in call.rows)))


def _swapped(
    x: Float[Array, "_ _ queries width"], rows: int, inner: int
) -> Float[Array, "{rows} {inner} outer queries width"]:
    """Two counts of heads, of which `inner` is the faster one, in the other order."""
    return jnp.swapaxes(x.reshape(rows, -1, inner, *x.shape[2:]), 1, 2)


def two_stage_attention(config: TwoStage, call: Call, selecting: SelectingBlocks) -> Attended:
    """Attention over the keys that each query block finds most important, in XLA.

    Stage 1 ranks without a relative position bias; the selection among its candidates and the softmax have it.

    Raises:
        ValueError: a relative position bias with compensation, whose mean keys have no distance.
    """
    query, keys, rows, mask, _, _ = call
    if mask.relative_bias is not None and config.compensation != "none":
        raise ValueError(
            f"compensation is {config.compensation!r}, which cannot go with a relative position bias, expected 'none'"
        )
    query_heads, queries = query.shape[1:3]
    group = query_heads // keys.kv_heads
    constants = {name: jnp.repeat(constant, group, axis=0) for name, constant in call.constants.items()}
    seen = seen_lengths(rows, queries, keys.capacity, mask.causal)
    blocked = split_queries(query, query_heads, config.query_block)
    heads, blocks, lanes = blocked.shape[:3]
    index = jnp.arange(blocks)[:, None] * config.query_block + jnp.arange(lanes)
    present = index < jnp.repeat(jnp.minimum(seen - rows.offset, queries), query_heads)[:, None, None]
    ranking = config.ranking.ranking_queries(blocked, present, constants)
    ranking = ranking._replace(scale=ranking.scale * scale_of(mask, query.shape[3]))
    keys = config.indexed(stage_1_keys(keys, config.key_block), call.constants)
    offsets = config.ranking.offsets(blocked, constants) * scale_of(mask, query.shape[3]) if config.mass else None
    sums = block_sums(keys) if config.compensation == "block_mean" else None
    logits = Logits.of(mask, query.shape[3], query_heads)
    exact_key_block = min(EXACT_KEY_BLOCK, keys.capacity)

    def attend_head(head: Int[Array, ""], out: Array) -> Array:
        row, query_head = head // query_heads, head % query_heads
        kv_head, logits_of = query_head // group, logits.of_head(query_head)
        slot, start, end = rows.slot[row], rows.offset[row], seen[row]
        count = valid_blocks(start, rows.length[row], blocks, config.query_block)
        first, last = selecting.first[row], selecting.last[row]

        def visibility_of(block: Int[Array, ""]) -> Visibility:
            return visibility_of_block(block, start, end, mask, lanes, config.query_block)

        def selected(block: Int[Array, ""], out: Array) -> Array:
            ranks = RankingQueries(*(x[head, block] for x in ranking))
            how = Selecting(config, keys, (slot, kv_head), logits_of, sums)
            offset = None if offsets is None else offsets[head, block]
            part = selected_block(
                how, QueryBlock(blocked[head, block], present[head, block], ranks, visibility_of(block), offset)
            )
            return out.at[head, block].set(part.output.astype(out.dtype))

        def exact(index: Int[Array, ""], out: Array) -> Array:
            # The exact blocks stand before and behind the selected ones: one loop serves both.
            block = jnp.where(index < first, index, last + index - first)
            part = exact_block(
                *(blocked[head, block], keys, (slot, kv_head), visibility_of(block), logits_of),
                exact_key_block,
            )
            return out.at[head, block].set(part.output.astype(out.dtype))

        out = lax.fori_loop(first, last, selected, out)
        return lax.fori_loop(0, first + count - last, exact, out)

    nothing = jnp.zeros((heads, blocks, lanes, keys.value.shape[-1]), query.dtype)
    out = lax.fori_loop(0, heads, attend_head, nothing)
    return join_queries(out, query.shape[0], queries, config.query_block)


def _default_query_block(budget: int) -> int:
    """The largest power of two up to an eighth of the budget, from 8 to 128."""
    return min(128, max(8, 1 << max(0, (budget // 8).bit_length() - 1)))
