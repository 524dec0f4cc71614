"""The crossover of decoding: from how many keys on a selection is faster for a new token than exact attention.

It is measured on this machine: a new token is timed both ways at a few depths, through the keys and values of as many
layers as no processor's cache holds. In a model, too, they come from memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..attention import Attention, Auto, Constants, DecodeSelection, Exact, KeyView, Mask, Plan, Rows, attend
from .crossover import (
    Choice,
    Clocked,
    CrossoverTable,
    TimedCall,
    clocked,
    constants_of,
    measured_lengths,
    stored,
    table_of,
)
from .manifest import CrossoverRow

_QUERIES = 256
"""Tokens whose queries calibrate the selection, at most; one of them is timed."""
_MEMORY = 64 * 2**20
"""Bytes of keys and values that a timed call reads, at least."""
_MOST_LAYERS = 64


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
    tokens = min(_QUERIES, capacity)
    query = rng.standard_normal((1, shape.query_heads, tokens, shape.head_dim), np.float32)
    key, value = rng.standard_normal((2, 1, shape.kv_heads, capacity, shape.head_dim), np.float32)
    constants = constants_of(selection, query[0], key[0])
    keys = selection.indexed(
        stored(jnp.asarray(key, timed.dtype), jnp.asarray(value, timed.dtype), timed.kv_dtype), constants
    )
    count = min(_MOST_LAYERS, -(-_MEMORY // (keys.key.nbytes + keys.value.nbytes)))
    layers = [jax.tree.map(jnp.copy, keys) for _ in range(count)]
    one = jnp.asarray(query[:, :, :1], timed.dtype)
    calls = tuple(_timed(strategy, one, layers, constants) for strategy in (Exact(), selection))
    lengths = measured_lengths(selection.exact_keys, 0, capacity)
    return table_of(calls, ((length - 1, length, length) for length in lengths), 1, count)


def _timed(attention: Attention, query: Array, layers: Sequence[KeyView], constants: Constants) -> Clocked:
    """A new token through all layers."""

    @jax.jit
    def call(query: Array, layers: Sequence[KeyView], rows: Rows, constants: Constants) -> Array:
        for keys in layers:
            query = query + attend(attention, query, keys, rows, Mask(causal=True), constants)
        return query

    return clocked(lambda rows: call(query, layers, rows, constants))


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
    nearest = table.nearest(capacity)
    chosen = replace(selection, crossover=crossover)
    return chosen, f"select from {crossover} keys: at {nearest.keys} it took {nearest.ratio:.2f} of the time"
