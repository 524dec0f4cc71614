"""The KV cache: what a call writes where, and that attention over it is attention over the whole rows."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import (
    Attention,
    Exact,
    Field,
    KeyView,
    LowRank,
    Mask,
    MeanPool,
    Plan,
    Rows,
    TwoStage,
    attend,
    extend,
)
from iceformer.attention.cache import LayerCache
from iceformer.attention.keys import as_floats, quantize

from ..few import few
from .calls import constants_of
from .reference import naive_attention, random_inputs

CAPACITY, TOKENS, HEAD_DIM, RANK, HEADS = 24, 3, 8, 5, 2
SLOTS = 3
# Slot 1 is free; its row of the call is idle, and its offset would reach past the end.
CALL = {"slot": (2, -1, 0), "offset": (4, 23, 17), "length": (7, 0, 20)}
PLAN = Plan(TwoStage(method=LowRank(rank=RANK), budget=256, key_block=4))
MEANS = Plan(TwoStage(method=MeanPool(), budget=256, key_block=4))


def rows_of(call: Mapping[str, Any]) -> Rows:
    return Rows(*(jnp.array(x, jnp.int32) for x in call.values()))


def cache_of(plan: Plan, capacity: int, dtype: str, fill: float = 7.0) -> LayerCache:
    arrays = {name: jnp.full((SLOTS, HEADS, capacity, HEAD_DIM), fill, dtype) for name in ("key", "value")}
    for name, field in plan.fields(HEAD_DIM).items():
        shape = (SLOTS, HEADS, capacity // field.tokens, *field.shape)
        arrays[name] = jnp.full(shape, fill, field.dtype)
    return arrays


def basis() -> jax.Array:
    made = np.random.default_rng(1).standard_normal((HEADS, 2, HEAD_DIM, RANK)).astype(np.float32)
    made[:, 1] *= 20
    return jnp.asarray(made)


def put(plan: Plan, cache: LayerCache, key: Any, value: Any, rows: Rows) -> Any:
    constants = constants_of(basis())

    def entries(name: str, runs: jax.Array) -> jax.Array:
        return plan.entries(name, runs, constants)

    return extend(cache, jnp.asarray(key), jnp.asarray(value), rows, Mask(), plan.fields(HEAD_DIM), entries)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_is_written_in_its_slot_at_its_offset_and_nowhere_else(dtype: str) -> None:
    _, key, value = random_inputs(0, 3, HEADS, HEADS, 1, TOKENS, HEAD_DIM)
    before = cache_of(PLAN, CAPACITY, dtype)
    new_key, new_value = (jnp.asarray(x, dtype) for x in (key, value))
    written = put(PLAN, before, new_key, new_value, rows_of(CALL)).cache
    # What stage 1 keeps of a key: its projection by the second half of the basis, rounded, and zeros up to 8.
    wide_key = np.asarray(new_key.astype(jnp.float32), np.float64)
    wide_basis = np.asarray(basis().astype(dtype).astype(jnp.float32), np.float64)
    projected = np.clip(np.round(wide_key @ wide_basis[:, 1]), -127, 127)
    assert len(np.unique(projected)) > 20
    news = {"key": new_key, "value": new_value}
    news["projected_key"] = jnp.asarray(np.pad(projected, ((0, 0), (0, 0), (0, 0), (0, 8 - RANK))))
    assert written.keys() == before.keys() == news.keys()
    for name, buffer in written.items():
        assert buffer.dtype == before[name].dtype
        expected = np.array(before[name].astype(jnp.float32))
        for row in (0, 2):
            slot, offset = CALL["slot"][row], CALL["offset"][row]
            expected[slot, :, offset : offset + TOKENS] = np.asarray(news[name], np.float32)[row]
        np.testing.assert_array_equal(np.asarray(buffer.astype(jnp.float32)), expected)


def test_means_of_key_blocks_follow_the_keys_from_call_to_call() -> None:
    """Calls begin and end in the middle of blocks; a block's mean is right once it is whole."""
    _, key, value = random_inputs(2, 1, HEADS, HEADS, 1, CAPACITY, HEAD_DIM)
    cache = cache_of(MEANS, CAPACITY, "float32", np.nan)
    start = 0
    for tokens in (3, 1, 1, 9, 2, 8):
        rows = rows_of({"slot": [1], "offset": [start], "length": [start + tokens]})
        piece = np.s_[:, :, start : start + tokens]
        cache = put(MEANS, cache, key[piece], value[piece], rows).cache
        start += tokens
        whole = start // 4
        expected = key[0, :, : whole * 4].reshape(HEADS, whole, 4, HEAD_DIM).mean(axis=2)
        np.testing.assert_allclose(cache["mean_key"][1, :, :whole], expected, rtol=1e-6)
    assert start == CAPACITY
    assert np.isnan(cache["mean_key"][0]).all()
    assert np.isnan(cache["mean_key"][2]).all()


def test_keys_and_values_of_int8_are_within_half_a_step() -> None:
    _, key, value = random_inputs(0, 3, HEADS, HEADS, 1, TOKENS, HEAD_DIM)
    key[0, 0, 1] = 0.0
    shape = (SLOTS, HEADS, CAPACITY)
    cache: LayerCache = {name: jnp.full((*shape, HEAD_DIM), 7, jnp.int8) for name in ("key", "value")}
    cache |= {name: jnp.full(shape, 7.0) for name in ("key_scale", "value_scale")}
    found = put(Plan(), cache, key, value, rows_of(CALL))
    for name, x in (("key", key), ("value", value)):
        rounded, scale = (np.asarray(found.cache[array], np.float64) for array in (name, f"{name}_scale"))
        for row in (0, 2):
            place = np.s_[CALL["slot"][row], :, CALL["offset"][row] : CALL["offset"][row] + TOKENS]
            step = scale[place][..., None]
            assert (np.abs(rounded[place] * step - x[row]) <= step * (0.5 + 1e-5)).all()
            np.testing.assert_allclose(step[..., 0] * 127, np.where(x[row].any(-1), np.abs(x[row]).max(-1), 127))
            rounded[place], scale[place] = 7, 7
        assert (rounded == 7).all()
        assert (scale == 7).all()
    with pytest.raises(ValueError, match="the cache has key, value, key_scale, expected key, value, key_scale, value_"):
        put(Plan(), {name: x for name, x in cache.items() if name != "value_scale"}, key, value, rows_of(CALL))


def test_what_is_written_has_the_buffers_dtype() -> None:
    cache = cache_of(Plan(), CAPACITY, "bfloat16")
    key = jnp.zeros((3, HEADS, TOKENS, HEAD_DIM))
    with pytest.raises(ValueError, match="the cache's key is bfloat16, and what is written to it is float32"):
        put(Plan(), cache, key, key, rows_of(CALL))


def test_a_cache_of_another_attention_is_refused() -> None:
    key = jnp.zeros((3, HEADS, TOKENS, HEAD_DIM))
    with pytest.raises(ValueError, match="the cache has key, value, mean_key, expected key, value, projected_key"):
        put(PLAN, cache_of(MEANS, CAPACITY, "float32"), key, key, rows_of(CALL))
    with pytest.raises(ValueError, match="which keep different things under one name"):
        Plan(TwoStage(method=LowRank(rank=8)), TwoStage(method=LowRank(rank=16)))


LONG, CHUNK, WINDOW = 512, 64, 100
STRATEGIES: dict[str, Attention] = {
    "exact": Exact(),
    "low_rank": TwoStage(method=LowRank(rank=HEAD_DIM), budget=128, query_block=16, local=8, key_block=8),
    "mean_pool": TwoStage(method=MeanPool(), budget=128, query_block=16, local=8, key_block=8),
    "block means": TwoStage(method=MeanPool(), budget=128, query_block=16, local=8, compensation="block_mean"),
}


def rows_in_turn(lengths: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Calls over rows of several lengths: rows, offsets and tokens, first chunks of one row each up to its last four
    tokens, then single tokens of all of them."""
    for row, length in enumerate(lengths):
        for start in range(0, length - 4, CHUNK):
            yield (row,), (start,), CHUNK
    for step in range(4):
        yield tuple(range(len(lengths))), tuple(length - 4 + step for length in lengths), 1


def pieces_of(x: np.ndarray, members: tuple[int, ...], offset: tuple[int, ...], tokens: int) -> jax.Array:
    """The tokens of a call over some rows."""
    return jnp.stack(
        [jnp.asarray(x[row, :, start : start + tokens]) for row, start in zip(members, offset, strict=True)]
    )


PLACES = [
    *((name, page, False) for name in STRATEGIES for page in (0, 128)),
    # An index of single tokens is made before keys are rounded, and may select others.
    *(("exact", 0, True), ("exact", 128, True), ("mean_pool", 0, True), ("block means", 128, True)),
]


@pytest.mark.parametrize(
    ("form", "name", "page", "int8"),
    few(
        [(form, *place) for form in ("xla", "kernels") for place in PLACES],
        [("xla", "exact", 0, True), ("kernels", "exact", 0, True), ("kernels", "low_rank", 128, False)],
    ),
    indirect=["form"],
)
def test_pages_and_slots_change_no_result(name: str, page: int, int8: bool) -> None:
    """Rows in chunks through slots, or pages, in any order, against each row by itself in one piece."""
    strategy = STRATEGIES[name]
    plan = Plan(strategy, strategy)
    lengths = (400, 131, 512)
    slots = np.array([2, 0, 1], np.int32)
    query, key, value = random_inputs(3, 3, 4, HEADS, LONG, LONG, HEAD_DIM)
    pages = SLOTS * LONG // page if page else SLOTS
    size = page or LONG
    table = None
    if page:
        table = jnp.asarray(np.random.default_rng(4).permutation(pages).reshape(SLOTS, -1), jnp.int32)
    constants = constants_of(jnp.broadcast_to(jnp.eye(HEAD_DIM) * 20, (HEADS, 2, HEAD_DIM, HEAD_DIM)))
    cache = nan_cache((pages, HEADS, size), int8)
    for kept, field in plan.fields(HEAD_DIM).items():
        cache[kept] = jnp.full((pages, HEADS, size // field.tokens, *field.shape), 77, field.dtype)

    @jax.jit
    def call(cache: LayerCache, query: Any, key: Any, value: Any, rows: Rows) -> tuple[LayerCache, Any]:
        def entries(field: str, runs: Any) -> Any:
            return plan.entries(field, runs, constants)

        cache, keys, rows, mask = extend(cache, key, value, rows, Mask(), plan.fields(HEAD_DIM), entries, table)
        return cache, attend(strategy, query, keys, rows, mask, constants)

    @jax.jit
    def whole(query: Any, key: Any, value: Any, length: Any) -> Any:
        return attend(strategy, query, KeyView(key, value), Rows.whole(length), Mask(), constants)

    stored = [rounded(x) for x in (key, value)] if int8 else (key, value)
    expected = np.asarray(whole(query, *stored, jnp.array(lengths, jnp.int32)))
    for members, offset, tokens in rows_in_turn(lengths):
        pieces = [pieces_of(x, members, offset, tokens) for x in (query, key, value)]
        length = jnp.array([lengths[row] for row in members], jnp.int32)
        rows = Rows(jnp.asarray(slots[list(members)]), jnp.array(offset, jnp.int32), length)
        cache, output = call(cache, *pieces, rows)
        for place, (row, start) in enumerate(zip(members, offset, strict=True)):
            # Compensation stands for blocks that a query block sees whole, which the end of a call decides as well.
            valid = min(tokens, lengths[row] - start)
            np.testing.assert_allclose(
                output[place, :, :valid], expected[row, :, start : start + valid], atol=2e-5, err_msg=f"{row} {start}"
            )


def nan_cache(shape: tuple[int, int, int], int8: bool) -> LayerCache:
    """Keys and values of no meaning; int8 have none by their scales."""
    if not int8:
        return {name: jnp.full((*shape, HEAD_DIM), np.nan) for name in ("key", "value")}
    cache: LayerCache = {name: jnp.full((*shape, HEAD_DIM), 7, jnp.int8) for name in ("key", "value")}
    return cache | {name: jnp.full(shape, np.nan) for name in ("key_scale", "value_scale")}


def rounded(x: np.ndarray) -> np.ndarray:
    """What a cache of int8 gives back."""
    return np.asarray(as_floats(*quantize(jnp.asarray(x)), jnp.float32))


@pytest.mark.parametrize(
    ("form", "lengths", "int8"),
    few(
        itertools.product(["xla", "kernels"], [(400, 131, 90), (100, 99, 101)], [False, True]),
        [("xla", (400, 131, 90), True), ("kernels", (400, 131, 90), True), ("kernels", (100, 99, 101), False)],
    ),
    indirect=["form"],
)
def test_a_ring_holds_what_a_sliding_window_sees(lengths: tuple[int, ...], int8: bool) -> None:
    query, key, value = random_inputs(5, 3, 4, HEADS, LONG, LONG, HEAD_DIM)
    cache = nan_cache((SLOTS, HEADS, WINDOW), int8)
    slots = np.array([1, 2, 0], np.int32)

    @jax.jit
    def call(cache: LayerCache, query: Any, key: Any, value: Any, rows: Rows) -> tuple[LayerCache, Any]:
        cache, keys, rows, mask = extend(cache, key, value, rows, Mask(window=WINDOW), {}, no_entries)
        return cache, attend(Exact(), query, keys, rows, mask)

    arguments: dict[str, Any] = {"offset": np.zeros(3, int), "lengths": np.array(lengths), "causal": True}
    stored = [rounded(x) for x in (key, value)] if int8 else (key, value)
    expected = naive_attention(query, *stored, window=WINDOW, **arguments)
    for members, offset, tokens in rows_in_turn(lengths):
        pieces = [pieces_of(x, members, offset, tokens) for x in (query, key, value)]
        # In front an idle row, whose offset would be of a row that has begun.
        pieces = [jnp.concatenate([jnp.full_like(x[:1], np.nan), x]) for x in pieces]
        end = [lengths[row] - 4 for row in members] if tokens > 1 else [start + 1 for start in offset]
        rows = rows_of({"slot": [-1, *slots[list(members)]], "offset": [70, *offset], "length": [80, *end]})
        cache, output = call(cache, *pieces, rows)
        np.testing.assert_array_equal(output[0], 0)
        for place, (row, start) in enumerate(zip(members, offset, strict=True), 1):
            valid = min(tokens, end[place - 1] - start)
            np.testing.assert_allclose(
                output[place, :, :valid], expected[row, :, start : start + valid], atol=2e-5, err_msg=f"{row} {start}"
            )


def no_entries(name: str, runs: Any) -> Any:
    raise AssertionError(name)


def test_fields_say_what_an_entry_stands_for() -> None:
    assert PLAN.fields(HEAD_DIM) == {"projected_key": Field((8,), "int8")}
    assert MEANS.fields(HEAD_DIM) == {"mean_key": Field((HEAD_DIM,), "float32", 4)}
    assert Plan().fields(HEAD_DIM) == {}
    both = Plan(
        TwoStage(method=LowRank(), budget=256, key_block=4), TwoStage(method=MeanPool(), budget=256, key_block=4)
    )
    assert set(both.fields(HEAD_DIM)) == {"projected_key", "mean_key"}
