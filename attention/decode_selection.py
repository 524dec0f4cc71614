"""Decoding over a selection: the new token's queries of a KV head share the key blocks that a method ranks highest, and
attend to these, to the sink and to their neighbourhood, by an exact softmax.

`choose` finds the blocks and `attend_chosen` attends to them. Rows of few keys attend exactly. With `refresh`,
`renewed` chooses for the rows that are due, and the others attend to what the cache keeps of their last choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from . import custom_calls
from .blocks import EXACT_KEY_BLOCK, Visibility, join_queries, seen_lengths, split_queries
from .cache import Field, Fields, State, put_state
from .chosen_keys import VALUE_SUM, ChosenKeys, Lane, mean_value, reallocated
from .compensation import MEAN_BLOCK
from .exact import Exact, Partial, exact_block, merge
from .keys import LEAST_PAGE
from .logits import Logits, scale_of
from .methods import Constants, LowRank, Method, RankingQueries, make_method
from .rows import Mask
from .sampling import Sample, draw, seed_of, standard_error
from .selection import IndexTiles, block_logits, select, stage_1_keys
from .strategy import Attended, Attention, Call, Selective, check_power_of_two

CHOSEN_BLOCKS, CHOSEN_COUNTS, CHOSEN_SEEN = "chosen_blocks", "chosen_counts", "chosen_seen"
"""The state: `blocks` and `counts` as `Chosen` has them, for each KV head of a slot, and how many keys the slot's token
saw that chose them; 0 where nothing is chosen."""
_T = TypeVar("_T")


class Chosen(NamedTuple):
    """What each KV head of each row attends to besides its neighbourhood. Heads count through rows and KV heads.

    Attributes:
        blocks: numbers of key blocks, rising; 0 behind the last.
        counts: how many they are; 0 for a row that attends exactly.
        share: of each query's estimated weight over all ranked blocks, what these hold. Used by `reallocate` only.
    """

    blocks: Int[Array, "*heads most"]
    counts: Int[Array, "*heads"]
    share: Float32[Array, "*heads group"]


@dataclass(frozen=True)
class DecodeSelection(Selective):
    """Attention of new tokens to the `budget` keys that a method ranks highest, in whole key blocks.

    The importance of a key block is the mean, over the queries that share the KV head, of the softmax weight that the
    method estimates for it among all ranked blocks. Layers with a sliding window or a relative position bias attend
    exactly, because the estimate knows of neither.

    Attributes:
        method: the rule that ranks key blocks: a name from the registry, or a method with its options. All queries of
            a group take part: `query_share` of `LowRank` becomes 1.
        budget: most keys that are attended to, those that are forced included.
        mass: 0 attends to the whole budget. Otherwise to as few key blocks as hold this share of the estimated weight
            (of Twilight's top-p, arXiv 2502.02770), within the budget.
        key_block: keys that stand or fall together, a power of two up to 128. 0 takes the method's own: 8, as far as it
            is not published with another (`sparq` 1, `page_bound` 16).
        sink: number of tokens at the start of the sequence that are always attended to, in whole key blocks.
        local: number of tokens before the new one that are always attended to, in whole key blocks.
        exact_layers: number of the first layers that attend exactly. An early layer's errors spoil all keys and values
            after it.
        crossover: rows of no more keys than this attend exactly. If it is below the budget, the budget is used instead.
        sample: number of the keys left out that a seeded uniform draw takes to stand in for all of them (vAttention,
            arXiv 2510.05688; see `attention.sampling`); 0 for none.
        reallocate: give the weight that is estimated to be left out to the mean of all values (SparQ, arXiv 2312.04985,
            algorithm 1): alpha * output + (1 - alpha) * mean.
        refresh: tokens that a row's selection serves, where the cache has room for it (`state`): it is made anew at the
            positions that are multiples of this number, and where there is none of this sequence, as after its prompt;
            1 for every token. Key blocks that leave the neighbourhood in between join the selection, within the budget,
            so that no key is attended to twice and none is left out because the selection is older than it.
    """

    kind: ClassVar[str] = "decode_selection"

    method: Method | str = "low_rank"
    budget: int = 1024
    mass: float = 0.0
    key_block: int = 0
    sink: int = 8
    local: int = 64
    exact_layers: int = 1
    crossover: int = 0
    sample: int = 0
    reallocate: bool = False
    refresh: int = 1

    def __post_init__(self) -> None:
        method = make_method(self.method) if isinstance(self.method, str) else self.method
        if not method.single_queries:
            raise ValueError(f"method is {method.name}, which ranks for blocks of queries, not for a new token")
        if self.mass and not method.estimates:
            raise ValueError(
                f"mass is {self.mass}, but {method.name} only ranks keys, and estimates no weights: leave it out"
            )
        object.__setattr__(self, "method", method.with_every_query)
        if self.key_block == 0:
            object.__setattr__(self, "key_block", self.ranking.key_block)
        check_power_of_two("key_block", self.key_block)
        if self.key_block > LEAST_PAGE:
            raise ValueError(
                f"key_block is {self.key_block}, expected at most {LEAST_PAGE} keys, which every page holds"
            )
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass is {self.mass}, expected a share from 0 (always the budget) to 1")
        if self.sink < 0 or self.local < 0:
            raise ValueError(f"sink is {self.sink} and local is {self.local}, expected numbers of tokens >= 0")
        if self.exact_layers < 0 or self.crossover < 0:
            raise ValueError(
                f"exact_layers is {self.exact_layers} and crossover is {self.crossover}, expected numbers >= 0"
            )
        if self.sample < 0 or self.sample == 1:
            raise ValueError(f"sample is {self.sample}, expected 0, or at least 2 keys, whose spread tells the error")
        if self.sample and self.reallocate:
            raise ValueError(
                f"sample is {self.sample} and reallocate is True, which both stand in for the keys left out: "
                "expected one of them"
            )
        if self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}, expected a number of tokens >= 1")
        if self.refresh > 1 and self.reallocate:
            raise ValueError(
                f"refresh is {self.refresh} and reallocate is True, which needs each token's own estimates: "
                "expected refresh 1, or sample instead of reallocate"
            )
        forced = (self.sink_blocks + self.local_blocks) * self.key_block
        if self.budget < forced:
            raise ValueError(
                f"budget is {self.budget}, but sink and local may force {forced} keys: "
                "raise budget, or lower sink, local or key_block"
            )
        if self.choosing_budget < forced:
            raise ValueError(
                f"budget is {self.budget}, but sink and local may force {forced} keys, and refresh {self.refresh} may "
                f"add {self.budget - self.choosing_budget}: raise budget, or lower refresh"
            )

    @property
    def sink_blocks(self) -> int:
        """Key blocks of the sink."""
        return -(-self.sink // self.key_block)

    @property
    def local_blocks(self) -> int:
        """Key blocks that the neighbourhood, the new token included, reaches into at most."""
        return -(-self.local // self.key_block) + 1

    @property
    def joining_blocks(self) -> int:
        """Key blocks that may leave the neighbourhood and join a selection while it is kept."""
        return -(-(self.refresh - 1) // self.key_block)

    @property
    def choosing_budget(self) -> int:
        """Keys to choose, the neighbourhood included: the budget without what may join later."""
        return self.budget - self.joining_blocks * self.key_block

    @property
    def most_blocks(self) -> int:
        """Places for key blocks to choose: besides a neighbourhood that reaches into the fewest, at least 1."""
        return max(1, self.choosing_budget // self.key_block - self.local // self.key_block - 1)

    @property
    def exact_keys(self) -> int:
        """Keys, in tokens, up to which a row attends to all that it sees."""
        return max(self.budget, self.crossover)

    def fields(self, head_dim: int) -> Fields:
        """The index of the method, and sums of the values for `reallocate`."""
        sums = {VALUE_SUM: Field((head_dim,), "float32", MEAN_BLOCK, of_values=True)} if self.reallocate else {}
        return {**super().fields(head_dim), **sums}

    def state(self, kv_heads: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The selection of each slot, and where it was made; nothing where each token makes its own."""
        if self.refresh == 1:
            return {}
        shapes = {CHOSEN_BLOCKS: (kv_heads, self.most_blocks), CHOSEN_COUNTS: (kv_heads,), CHOSEN_SEEN: ()}
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    def renewed(self, call: Call, *, in_kernel: bool) -> State:
        """The state with a new selection of the rows that are due for one. Only these rank anything."""
        if not call.state:
            return call.state
        _check_one_query(call)
        due = self._due(call)
        rows = call.rows._replace(slot=jnp.where(due, call.rows.slot, -1))

        def chosen() -> State:
            choose = self._chosen_in_kernel if in_kernel else self._chosen_in_xla
            blocks, counts = choose(call._replace(rows=rows))
            heads = (due.shape[0], call.keys.kv_heads)
            new = {CHOSEN_BLOCKS: blocks.reshape(*heads, -1), CHOSEN_COUNTS: counts.reshape(heads)}
            return put_state(call.state, rows.slot, {**new, CHOSEN_SEEN: _seen(call)})

        return lax.cond(jnp.any(due), chosen, lambda: dict(call.state))

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens width"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What new keys, or for `reallocate` values, add to a field."""
        if field == VALUE_SUM:
            return jnp.sum(key.astype(jnp.float32), axis=2)
        return super().entries(field, key, constants)

    def of_layer(self, layer: int) -> Attention:
        """Exact attention in the first layers."""
        return Exact() if layer < self.exact_layers else self

    def within(self, capacity: int, mask: Mask) -> Attention:
        """Exact attention, where the budget or the crossover covers every key, and where keys are not all those up to
        the query's own: with a sliding window, whose ring has no order, and without the causal mask. With a relative
        position bias too, because keys would be ranked without it."""
        all_before = mask.causal and mask.window is None and mask.relative_bias is None
        return self if all_before and capacity > self.exact_keys else Exact()

    def attend(self, call: Call) -> Attended:
        _check_one_query(call)

        def select() -> Attended:
            prepared = self.prepared(call)
            return self.attend_chosen(prepared, self._kept(prepared) if call.state else self.choose(prepared))

        return lax.cond(jnp.any(_seen(call) > self.exact_keys), select, lambda: Exact().attend(call))

    def objection(self, call: Call) -> str | None:
        """Why no native kernel computes this."""
        if self.sample or self.reallocate:
            return f"there is no kernel for {'sample' if self.sample else 'reallocate'}"
        if call.keys.page % self.key_block:
            return f"the kernels take pages of whole key blocks, and these have {call.keys.page} tokens"
        return custom_calls.objection(call)

    def attend_in_kernel(self, call: Call) -> Attended:
        """The choice is the kernel's for `low_rank`, XLA's for other methods."""
        _check_one_query(call)
        blocks, counts, *_ = self._kept(call) if call.state else self._chosen_in_kernel(call)
        return custom_calls.attend_chosen(self, call, blocks, counts)[0]

    def _due(self, call: Call) -> Bool[Array, " rows"]:
        """The rows that choose: those that select, at every `refresh`-th position or without a selection of their own
        sequence that is recent enough."""
        call = _settled(call)
        seen, then = _seen(call), call.state[CHOSEN_SEEN][call.rows.slot]
        lasts = (then > 0) & (then <= seen) & (seen < then + self.refresh) & ((seen - 1) % self.refresh > 0)
        return (seen > self.exact_keys) & ~lasts

    def _kept(self, call: Call) -> Chosen:
        """The selection that the state holds, with the key blocks that have left the neighbourhood since."""
        call = _settled(call)
        seen, slot, group = _seen(call), call.rows.slot, call.query.shape[1] // call.keys.kv_heads
        blocks, counts, then = (call.state[name][slot] for name in (CHOSEN_BLOCKS, CHOSEN_COUNTS, CHOSEN_SEEN))
        # Of all heads, as `Chosen` counts them; nothing of rows that attend exactly.
        seen, then = (jnp.repeat(x, call.keys.kv_heads) for x in (seen, then))
        selects, first = seen > self.exact_keys, self._start(then) // self.key_block
        joined = jnp.where(selects, self._start(seen) // self.key_block - first, 0)
        counts = jnp.where(selects, counts.reshape(-1), 0)
        blocks = jnp.pad(blocks.reshape(seen.size, -1), ((0, 0), (0, self.joining_blocks)))
        behind = jnp.arange(blocks.shape[1]) - counts[:, None]
        blocks = jnp.where(behind < 0, blocks, first[:, None] + behind)
        blocks = jnp.where(behind < joined[:, None], blocks, 0)
        return Chosen(blocks, counts + joined, jnp.zeros((seen.size, group)))

    def _start(self, seen: Int[Array, "*rows"]) -> Int[Array, "*rows"]:
        """Where the neighbourhood of a token that sees so many keys begins."""
        return jnp.maximum(seen - 1 - self.local, 0) // self.key_block * self.key_block

    def _chosen_in_kernel(self, call: Call) -> tuple[Int[Array, "heads most"], Int[Array, " heads"]]:
        method, (query, keys, _, _, constants, _) = self.ranking, call
        if not isinstance(method, LowRank):
            return self._chosen_in_xla(call)
        call = call._replace(keys=self.indexed(keys, constants))
        projected = method.projected_queries(split_queries(query, keys.kv_heads, 1), constants)
        return custom_calls.choose(self, call, projected[:, 0])

    def _chosen_in_xla(self, call: Call) -> tuple[Int[Array, "heads most"], Int[Array, " heads"]]:
        call = _settled(call)
        heads = call.query.shape[0] * call.keys.kv_heads
        nothing = jnp.zeros((heads, self.most_blocks), jnp.int32), jnp.zeros(heads, jnp.int32)
        select = jnp.any(_seen(call) > self.exact_keys)
        return lax.cond(select, lambda: self.choose(self.prepared(call))[:2], lambda: nothing)

    def prepared(self, call: Call) -> Call:
        """The call with its keys in whole tiles of stage 1, and with the index."""
        keys = self.indexed(stage_1_keys(call.keys, self.key_block), call.constants)
        return call._replace(keys=keys, rows=call.rows._replace(length=_seen(call)))

    def choose(self, call: Call) -> Chosen:
        """The key blocks, sink included, that each head attends to besides its neighbourhood.

        Blocks of the sink come first, then those of the largest mean weight, of equal ones the first, until they and
        the blocks of the neighbourhood are the budget, or until their summed weight reaches `mass`.

        Args:
            call: prepared; none of its rows is idle.
        """
        query, keys, _, mask, constants, _ = call
        blocked = split_queries(query, keys.kv_heads, 1)
        method = self.ranking
        ranking = method.ranking_queries(blocked, jnp.ones(blocked.shape[:3], bool), constants)
        ranking = ranking._replace(scale=ranking.scale * scale_of(mask, query.shape[3]))

        def selected(number: Int[Array, ""], lane: Lane) -> Chosen:
            queries = RankingQueries(*(x[number, 0] for x in ranking))
            ranked = lane.start // self.key_block
            index = IndexTiles(keys, lane.head, self.key_block)
            local = (lane.seen - 1) // self.key_block + 1 - ranked
            most = jnp.minimum(self.choosing_budget // self.key_block - local, ranked)
            return self._best(block_logits(method, queries, index, ranked, mask.softcap), ranked, most)

        nothing = Chosen(jnp.zeros(self.most_blocks, jnp.int32), jnp.int32(0), jnp.zeros(blocked.shape[2]))
        return self._each_head(call, selected, lambda _: nothing)

    def attend_chosen(self, call: Call, chosen: Chosen) -> Attended:
        """Attention to the chosen key blocks and the neighbourhood; exact attention of rows of few keys.

        Args:
            call: as `choose` took it.
            chosen: what it gave.
        """
        query, keys, _, mask, *_ = call
        logits = Logits.of(mask, query.shape[3], keys.kv_heads)

        def selected(number: Int[Array, ""], lane: Lane) -> Array:
            of_head = Chosen(*(x[number] for x in chosen))
            whole, of_chosen = self._parts(call, lane, of_head)
            if not self.reallocate:
                return whole.output.astype(query.dtype)
            return reallocated(whole, of_chosen, of_head.share, mean_value(keys, lane)).astype(query.dtype)

        def exact(lane: Lane) -> Array:
            visibility = Visibility(jnp.broadcast_to(lane.seen - 1, lane.query.shape[:1]), lane.seen, causal=True)
            key_block = min(EXACT_KEY_BLOCK, keys.capacity)
            return exact_block(lane.query, keys, lane.head, visibility, logits, key_block).output.astype(query.dtype)

        out = self._each_head(call, selected, exact)
        return join_queries(out[:, None], query.shape[0], 1, 1)

    def sampling_error(self, call: Call, chosen: Chosen) -> Float32[Array, "rows query_heads"]:
        """The standard error of the weight that `sample` estimates for the keys left out, as a share of all weight; 0
        for rows that attend exactly, and where no key is left to chance.

        Args:
            call: as `choose` took it.
            chosen: what it gave.
        """

        def selected(number: Int[Array, ""], lane: Lane) -> Array:
            of_head = Chosen(*(x[number] for x in chosen))
            whole, _ = self._parts(call, lane, of_head)
            sample = self._sample(lane, of_head)
            return standard_error(_keys_of(call, lane).logits(sample.position, 1), sample, whole.lse)

        errors = self._each_head(call, selected, lambda lane: jnp.zeros(lane.query.shape[0]))
        return errors.reshape(call.query.shape[:2])

    def _each_head(self, call: Call, selected: Callable[[Int[Array, ""], Lane], _T], exact: Callable[[Lane], _T]) -> _T:
        """The results of all heads, counted through rows and KV heads: of `selected` where the row selects."""
        kv_heads = call.keys.kv_heads
        blocked, seen = split_queries(call.query, kv_heads, 1), _seen(call)

        def lane_of(number: Int[Array, ""]) -> Lane:
            row = number // kv_heads
            start = self._start(seen[row])
            return Lane(blocked[number, 0], (call.rows.slot[row], number % kv_heads), seen[row], start)

        def one(number: Int[Array, ""]) -> _T:
            lane = lane_of(number)
            return lax.cond(lane.seen > self.exact_keys, lambda: selected(number, lane), lambda: exact(lane))

        return lax.map(one, jnp.arange(blocked.shape[0], dtype=jnp.int32))

    def _best(self, logits: Float[Array, "blocks group"], ranked: Int[Array, ""], most: Int[Array, ""]) -> Chosen:
        """The blocks of one head, at most `most` of the first `ranked`, from their estimated logits."""
        blocks = logits.shape[0]
        weights = jax.nn.softmax(logits, axis=0)
        mean = jnp.mean(weights, axis=1)
        block, place = jnp.arange(blocks), jnp.arange(self.most_blocks)
        best, _ = select(mean, block < self.sink_blocks, block < ranked, self.most_blocks)
        taken = place < most
        if self.mass:
            before = jnp.pad(jnp.cumsum(mean[best])[:-1], (1, 0))
            taken &= (before < self.mass) | (best < self.sink_blocks)
        share = jnp.sum(jnp.where(taken[:, None], weights[best], 0.0), axis=0)
        rising = jnp.sort(jnp.where(taken, best, blocks))
        return Chosen(jnp.where(rising < blocks, rising, 0), jnp.sum(taken, dtype=jnp.int32), share)

    def _parts(self, call: Call, lane: Lane, chosen: Chosen) -> tuple[Partial, Partial]:
        """Attention of one head to all that counts for it, and to the chosen blocks only."""
        keys, size = _keys_of(call, lane), self.key_block
        place = jnp.arange(chosen.blocks.shape[0])
        of_chosen = keys.attend(chosen.blocks * size, size, place < chosen.counts)
        local = lane.start + jnp.arange(self.local_blocks, dtype=jnp.int32) * size
        whole = merge(of_chosen, keys.attend(local, size, local < lane.seen))
        if self.sample:
            sample = self._sample(lane, chosen)
            whole = merge(whole, keys.attend(sample.position, 1, sample.drawn, sample.raised()))
        return whole, of_chosen

    def _sample(self, lane: Lane, chosen: Chosen) -> Sample:
        seed = seed_of(lane.seen - 1, lane.head[1])
        return draw(seed, self.sample, chosen.blocks, chosen.counts, lane.start // self.key_block, self.key_block)


def _check_one_query(call: Call) -> None:
    if call.query.shape[2] != 1:
        raise ValueError(
            f"the call has {call.query.shape[2]} queries a head, but decode_selection is for new tokens, one at a "
            "time: give it as the decode of a Plan(prompt, decode)"
        )


def _settled(call: Call) -> Call:
    return call._replace(rows=call.rows.settled())


def _seen(call: Call) -> Int[Array, " rows"]:
    """The keys that each row's new token sees."""
    return seen_lengths(call.rows, 1, call.keys.capacity, causal=True)


def _keys_of(call: Call, lane: Lane) -> ChosenKeys:
    return ChosenKeys(call.keys, lane, scale_of(call.mask, call.query.shape[3]), call.mask.softcap)
