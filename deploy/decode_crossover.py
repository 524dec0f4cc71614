"""The crossover of decoding: from how many keys on a selection is faster for a new token than exact attention.

It is measured on this machine: a new token is timed both ways at a few depths, through the keys and values of as many
layers as no processor's cache holds. In a model, too, they come from memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..attention import Attention, Auto, Constants, DecodeSelection, Exact, KeyView, Mask, Plan, Rows, attend
from .crossover import Choice, CrossoverTable, TimedCall, crossover_of, measured_lengths, race, stored
from .manifest import CrossoverRow

_CALIBRATION_TOKENS = 256
_MEMORY = 64 * 2**20
"""Bytes of keys and values that a timed call reads, at least."""
_MOST_LAYERS = 64
_CLEAR_WIN = 0.8
"""The ratio from which the selection has won so clearly that deeper rows need no look, if it does so twice."""


def decide_decode(
    choices: Sequence[Choice],
    asked: Plan | Auto,
    buckets: Sequence[int],
    timed: TimedCall,
    report: Callable[[str], None],
) -> tuple[tuple[Choice, ...], tuple[CrossoverRow, ...]]:
    """The choices with what `Auto` chooses for new tokens, and what was measured for it.

    Args:
        choices: what was chosen for the prompts of each bucket.
        asked: a plan, which leaves no choice, or `Auto`.
        buckets: rising capacities in tokens.
        timed: of the model's attention.
        report: called with a line of text before the measurement, if there is one.
    """
    if not isinstance(asked, Auto) or asked.decode is None or timed.only_exact:
        return tuple(choices), ()
    table = None
    if needs_decode_measurement(asked, buckets, timed):
        report("measuring the crossover of decoding")
        table = measure_decode(asked.decode, timed, buckets[-1])
    made = [_with_decode(each, asked.decode, table, size) for each, size in zip(choices, buckets, strict=True)]
    return tuple(made), table.rows if table else ()


def needs_decode_measurement(asked: Plan | Auto, buckets: Sequence[int], timed: TimedCall) -> bool:
    """Whether rows may be so long that what is faster for their new tokens is a question."""
    if not isinstance(asked, Auto) or asked.decode is None or timed.only_exact:
        return False
    return not asked.decode.crossover and buckets[-1] > asked.decode.exact_keys


def measure_decode(selection: DecodeSelection, timed: TimedCall, capacity: int) -> CrossoverTable:
    """Times a new token of one row with exact attention and with the selection at several depths, on random numbers.

    Args:
        selection: without a crossover.
        timed: of the model's attention.
        capacity: in tokens; the deepest row that is measured.
    """
    shape = timed.shape
    rng = np.random.default_rng(0)
    tokens = min(_CALIBRATION_TOKENS, capacity)
    query = rng.standard_normal((1, shape.query_heads, tokens, shape.head_dim), np.float32)
    key, value = rng.standard_normal((2, 1, shape.kv_heads, capacity, shape.head_dim), np.float32)
    learned = selection.calibrate(query[0], key[0, :, :tokens])
    constants = {name: jnp.asarray(array) for name, array in learned.items()}
    keys = selection.indexed(
        stored(jnp.asarray(key, timed.dtype), jnp.asarray(value, timed.dtype), timed.kv_dtype), constants
    )
    count = min(_MOST_LAYERS, -(-_MEMORY // (keys.key.nbytes + keys.value.nbytes)))
    layers = [jax.tree.map(jnp.copy, keys) for _ in range(count)]
    one = jnp.asarray(query[:, :, :1], timed.dtype)
    calls = tuple(_timed(strategy, one, layers, constants) for strategy in (Exact(), selection))
    rows: list[CrossoverRow] = []
    for length in measured_lengths(selection.exact_keys, 0, capacity):
        seconds = race(calls, length - 1, length)
        rows.append(CrossoverRow(length, *(round(value / count, 9) for value in seconds)))
        if len(rows) > 1 and max(row.ratio for row in rows[-2:]) < _CLEAR_WIN:
            break
    return CrossoverTable(tuple(rows), crossover_of(rows, 1))


def _timed(
    attention: Attention, query: Array, layers: Sequence[KeyView], constants: Constants
) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function that gives the seconds of a token, at an offset and lengths, through all layers."""

    @jax.jit
    def call(query: Array, layers: Sequence[KeyView], rows: Rows, constants: Constants) -> Array:
        for keys in layers:
            query = query + attend(attention, query, keys, rows, Mask(causal=True), constants)
        return query

    def seconds(offset: np.ndarray, lengths: np.ndarray) -> float:
        rows = Rows(np.zeros(1, np.int32), offset, lengths)  # type: ignore[arg-type]
        start = perf_counter()
        call(query, layers, rows, constants).block_until_ready()
        return perf_counter() - start

    return seconds


def _with_decode(choice: Choice, selection: DecodeSelection, table: CrossoverTable | None, capacity: int) -> Choice:
    decode, why = _chosen(selection, table, capacity)
    return Choice(Plan(choice.plan.prompt, decode), f"{choice.reason}; new tokens {why}")


def _chosen(selection: DecodeSelection, table: CrossoverTable | None, capacity: int) -> tuple[Attention, str]:
    """The attention of new tokens in a bucket of `capacity` tokens, and why."""
    if capacity <= selection.exact_keys:
        return Exact(), f"exact: this bucket holds no more than {selection.exact_keys} keys"
    if table is None:
        return selection, "as asked"
    crossover = table.crossover
    if crossover is None:
        last = table.rows[-1]
        return Exact(), f"exact: at {last.keys} keys a selection took {last.ratio:.2f} of the time"
    if capacity <= crossover:
        return Exact(), f"exact: a selection is faster only from {crossover} keys"
    nearest = min(table.rows, key=lambda row: (row.ratio >= 1, abs(row.keys - capacity)))
    chosen = replace(selection, crossover=crossover)
    return chosen, f"select from {crossover} keys: at {nearest.keys} it took {nearest.ratio:.2f} of the time"
