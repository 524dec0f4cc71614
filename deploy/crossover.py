"""The crossover: from how many keys on two-stage attention is faster than exact attention, measured on this machine.

One chunk of a prompt, or an encoder's whole row, is timed both ways at a few lengths. `decide` gives each bucket what
is faster there and says why.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..attention import Attention, Auto, Constants, Exact, KeyView, Mask, Plan, Rows, TwoStage, attend
from ..attention.keys import quantize
from ..attention.shape import AttentionShape
from .evidence import Evidence
from .manifest import CrossoverRow

_ROUNDS = (3, 15)
"""Timed calls of each kind at a length: the first number at least, the second at most."""
_SECONDS = 0.5
"""What the rounds after the least number may take at a length."""
_CLEAR_WIN = 0.8
"""The ratio from which two-stage attention has won so clearly that longer prompts need no look, if it does so twice."""
_KEYS_BY_MASS, _CANDIDATES_BY_MASS = 1024, 2.0
"""What a query block was found to need on average by a mass of 0.98, on 8192 tokens of books (SmolLM2)."""
_CALIBRATION_TOKENS = 256
Clocked = Callable[[np.ndarray, np.ndarray], float]
"""The seconds of a call at an offset and lengths."""
Calls = tuple[Clocked, ...]


@dataclass(frozen=True)
class TimedCall:
    """What the time of a model's attention depends on, besides its configuration.

    Attributes:
        shape: of a layer; where it is not causal, the whole row is timed, whatever `chunk` says.
        dtype: of queries, and of keys and values unless `kv_dtype` says otherwise.
        batch: rows of a call.
        chunk: tokens of a row that one call takes, or as many as are timed at once.
        only_exact: why two-stage attention is out of the question, in words; empty if it is not.
        kv_dtype: "int8" where keys and values are; else `dtype`, or empty for that.
    """

    shape: AttentionShape
    dtype: str
    batch: int
    chunk: int
    only_exact: str = ""
    kv_dtype: str = ""


@dataclass(frozen=True)
class CrossoverTable:
    """What was measured, by rising number of keys, and the crossover that follows from it.

    Attributes:
        rows: the measurements.
        crossover: keys from which two-stage attention is faster, a multiple of its query block; None if it never is.
    """

    rows: tuple[CrossoverRow, ...]
    crossover: int | None

    def nearest(self, capacity: int) -> CrossoverRow:
        """Of the measurements that exact attention lost, the one nearest to a capacity."""
        return min(self.rows, key=lambda row: (row.ratio >= 1, abs(row.keys - capacity)))


@dataclass(frozen=True)
class Choice:
    """The plan of a bucket, one sentence that says why, and what was measured for a contract, if there is one."""

    plan: Plan
    reason: str
    evidence: tuple[Evidence, ...] = ()


def decide(
    asked: Plan | Auto, buckets: Sequence[int], timed: TimedCall, report: Callable[[str], None]
) -> tuple[tuple[Choice, ...], tuple[CrossoverRow, ...]]:
    """The plan of each bucket, and what was measured for it: nothing where `asked` leaves no choice.

    Args:
        asked: a plan, which every bucket gets as it is, or `Auto`.
        buckets: rising capacities in tokens.
        timed: of the model's attention.
        report: called with a line of text before the measurement, if there is one.
    """
    if not isinstance(asked, Auto):
        return (Choice(asked, "as asked"),) * len(buckets), ()
    if timed.only_exact:
        return (Choice(Plan(), f"exact: {timed.only_exact}"),) * len(buckets), ()
    table = None
    if needs_measurement(asked, buckets, timed):
        report("measuring the crossover")
        table = measure(asked.two_stage, timed, buckets[-1])
    choices = tuple(choose(asked.two_stage, table, capacity) for capacity in buckets)
    return choices, table.rows if table else ()


def needs_measurement(asked: Plan | Auto, buckets: Sequence[int], timed: TimedCall) -> bool:
    """Whether a layer may see more keys than the budget, so that what is faster there is a question."""
    return isinstance(asked, Auto) and not timed.only_exact and buckets[-1] > asked.two_stage.least_keys


def choose(two_stage: TwoStage, table: CrossoverTable | None, capacity: int) -> Choice:
    """The plan of a bucket of `capacity` tokens; no table is needed where the budget covers every key."""
    if capacity <= two_stage.least_keys:
        return Choice(Plan(), f"exact: this bucket holds no more keys than the budget, {two_stage.least_keys}")
    assert table is not None
    crossover = table.crossover
    if crossover is None:
        last = table.rows[-1]
        return Choice(
            Plan(), f"exact: at {last.keys} keys two-stage took {last.ratio:.2f} of the time of exact attention"
        )
    if capacity <= crossover:
        return Choice(Plan(), f"exact: two-stage is faster only from {crossover} keys")
    nearest = table.nearest(capacity)
    took = f"at {nearest.keys} keys it took {nearest.ratio:.2f} of the time of exact attention"
    return Choice(Plan(replace(two_stage, crossover=crossover)), f"two-stage from {crossover} keys: {took}")


def crossover_of(rows: Sequence[CrossoverRow], multiple: int) -> int | None:
    """The number of keys from which two-stage attention is faster at every larger number that was measured.

    It lies where the ratio of the times crosses 1, read linearly over the logarithm of the keys, and is rounded up to a
    multiple. If the first row is a win it is that row's; if the last one is none, there is no crossover.

    Args:
        rows: by rising number of keys.
        multiple: tokens of a query block.
    """
    wins = len(list(itertools.takewhile(lambda row: row.ratio < 1, reversed(rows))))
    if not wins:
        return None
    keys = float(rows[-wins].keys)
    if wins < len(rows):
        before, after = rows[-wins - 1], rows[-wins]
        share = (before.ratio - 1) / (before.ratio - after.ratio)
        keys = before.keys * (after.keys / before.keys) ** share
    return math.ceil(keys / multiple) * multiple


def measure(two_stage: TwoStage, timed: TimedCall, capacity: int) -> CrossoverTable:
    """Times one call with exact and with two-stage attention at several lengths, on random queries, keys and values.

    By mass the time depends on the text: a fixed budget is timed, of as many keys as a real model was found to need.
    Called as the compiled entries call attention: keys of the whole capacity (in a cache, where attention is causal),
    offset and lengths unknown when it is compiled. Fewer heads than the model's are timed, as many as occupy all
    threads.

    Args:
        two_stage: the configuration, whose crossover and exact last block play no part.
        timed: of the model's attention.
        capacity: in tokens; the longest length that is measured.
    """
    shape = timed.shape
    chunk = min(timed.chunk, capacity) if shape.causal else capacity
    heads, group = _heads(two_stage, timed, chunk), shape.query_heads // shape.kv_heads
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((1, count, tokens, shape.head_dim), np.float32)
        for count, tokens in ((heads * group, chunk), (heads, capacity), (heads, capacity))
    )
    constants = constants_of(two_stage, query[0], key[0])
    arrays = tuple(jnp.asarray(array, timed.dtype) for array in (query, key, value))
    # The last block of a prompt attends exactly in one chunk of many, so it is left out.
    two_stage = replace(_of_known_cost(two_stage), crossover=0, exact_last_block=False)
    budget = two_stage.least_keys
    keys = stored(arrays[1], arrays[2], timed.kv_dtype)
    calls = tuple(_timed(strategy, arrays[0], keys, constants, shape.causal) for strategy in (Exact(), two_stage))

    def places() -> Iterator[tuple[int, int, int]]:
        for length in measured_lengths(budget, chunk if shape.causal else 0, capacity):
            offset = length - chunk if shape.causal else 0
            # Query blocks within the budget are the same work both ways; this is what the others see on average.
            yield offset, length, (max(offset, budget) + length) // 2 if shape.causal else length

    return table_of(calls, places(), two_stage.query_block)


def _of_known_cost(two_stage: TwoStage) -> TwoStage:
    """With a fixed budget in place of a mass: random queries look everywhere, and would need nearly every key."""
    if not two_stage.mass:
        return two_stage
    keys = max(two_stage.least_keys, min(two_stage.most_keys, _KEYS_BY_MASS))
    return replace(two_stage, mass=0.0, budget=keys, candidates=_CANDIDATES_BY_MASS)


def table_of(calls: Calls, places: Iterable[tuple[int, int, int]], multiple: int, layers: int = 1) -> CrossoverTable:
    """The table of a race at several places, up to where exact attention has clearly lost twice.

    Args:
        calls: exact attention, and what it is compared with.
        places: offset, length and number of keys of each measurement, by rising number of keys.
        multiple: of the crossover, in tokens.
        layers: that a call goes through, of which the table has one's time.
    """
    rows: list[CrossoverRow] = []
    for offset, length, keys in places:
        rows.append(CrossoverRow(keys, *(round(value, 6) / layers for value in _race(calls, offset, length))))
        if len(rows) > 1 and max(row.ratio for row in rows[-2:]) < _CLEAR_WIN:
            break
    return CrossoverTable(tuple(rows), crossover_of(rows, multiple))


def measured_lengths(budget: int, chunk: int, capacity: int) -> Iterator[int]:
    """Row lengths, in tokens, whose last chunk is timed: doubling from where every query sees the budget.

    `chunk` is 0 where attention is not causal: every query sees the whole row, which is one call.
    """
    length = budget + max(budget, chunk)
    while length < capacity:
        yield length
        length *= 2
    yield capacity


def _heads(two_stage: TwoStage, timed: TimedCall, chunk: int) -> int:
    """KV heads to time: up to those of a call, and four query blocks for each thread."""
    blocks = max(1, chunk // max(Exact().query_block, two_stage.query_block))
    return min(timed.batch * timed.shape.kv_heads, -(-4 * len(os.sched_getaffinity(0)) // blocks))


def constants_of(attention: Attention, query: np.ndarray, key: np.ndarray) -> Constants:
    """What a strategy is calibrated to by the first of some queries and keys."""
    tokens = min(_CALIBRATION_TOKENS, query.shape[1])
    learned = attention.calibrate(query[:, :tokens], key[:, :tokens])
    return {name: jnp.asarray(array) for name, array in learned.items()}


def stored(key: Array, value: Array, kv_dtype: str) -> KeyView:
    """Keys and values as the cache holds them."""
    if kv_dtype != "int8":
        return KeyView(key, value)
    (keys, key_scale), (values, value_scale) = quantize(key), quantize(value)
    return KeyView(keys, values, {}, None, key_scale, value_scale)


def _timed(attention: Attention, query: Array, keys: KeyView, constants: Constants, causal: bool) -> Clocked:
    # The cache of a compiled entry holds the index; an encoder has none and makes it in the call.
    if causal and isinstance(attention, TwoStage):
        keys = attention.indexed(keys, constants)

    @jax.jit
    def call(query: Array, keys: KeyView, rows: Rows, constants: Constants) -> Array:
        return attend(attention, query, keys, rows, Mask(causal), constants)

    return clocked(lambda rows: call(query, keys, rows, constants))


def clocked(call: Callable[[Rows], Array]) -> Clocked:
    """A function that gives the seconds of a call of one row at an offset and lengths."""

    def seconds(offset: np.ndarray, lengths: np.ndarray) -> float:
        rows = Rows(np.zeros(1, np.int32), offset, lengths)  # type: ignore[arg-type]
        start = time.perf_counter()
        call(rows).block_until_ready()
        return time.perf_counter() - start

    return seconds


def _race(calls: Calls, offset: int, length: int) -> list[float]:
    """The median seconds of each call, in turn, after one that is not counted."""
    row = np.array([offset], np.int32), np.array([length], np.int32)
    for call in calls:
        call(*row)
    rounds: list[list[float]] = []
    least, most = _ROUNDS
    while len(rounds) < least or (len(rounds) < most and sum(map(sum, rounds)) < _SECONDS):
        rounds.append([call(*row) for call in calls])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
