"""The native kernels against the XLA form, with every instruction set that this processor has."""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float

from iceformer import kernels
from iceformer.attention import Call, DecodeSelection, Exact, KeyView, LowRank, Mask, Rows, TwoStage, custom_calls
from iceformer.attention.blocks import split_queries
from iceformer.attention.keys import as_floats, quantize

from ..few import few
from .calls import exact_attention, scattered, two_stage_attention
from .reference import naive_attention, random_inputs


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """Both forms are compared in each test of this module, so that it runs once."""


EXAMPLES = int(os.environ.get("ICEFORMER_EXAMPLES", "4"))
"""Of each case."""


@dataclass(frozen=True)
class Case:
    """A call's shape and options. `value_dim` 0 is head_dim; `int8` is of keys and values in memory."""

    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    queries: int = 96
    keys: int = 400
    head_dim: int = 64
    value_dim: int = 0
    dtype: str = "float32"
    causal: bool = True
    softcap: float | None = None
    window: int | None = None
    two_stage: dict[str, Any] | None = field(default=None, hash=False)
    int8: bool = False


SMALL: dict[str, Any] = {"budget": 96, "query_block": 16, "key_block": 8, "candidates": 1.5, "sink": 4, "local": 4}
# Room for a key of each query of a block: were logits so large that each has but one, chance would choose among them.
MORE = {"budget": 192}
HALF = {"method": LowRank(rank=30, query_share=0.5)}
CASES = {
    "exact": Case(batch=3),
    "exact, one query": Case(queries=1, heads=(3, 3)),
    "exact, one query, odd sizes, softcap": Case(
        queries=1, heads=(7, 1), keys=333, head_dim=36, value_dim=5, causal=False, softcap=50.0
    ),
    "exact, one query, bfloat16": Case(
        queries=1, dtype="bfloat16", heads=(10, 2), keys=331, head_dim=80, value_dim=71, causal=False, window=40
    ),
    "exact, one query, int8": Case(queries=1, heads=(6, 2), int8=True),
    "exact, one query, int8, head size 128, bfloat16": Case(
        queries=1, heads=(5, 1), head_dim=128, value_dim=64, dtype="bfloat16", int8=True
    ),
    "exact, one query, int8, odd sizes, softcap, bfloat16": Case(
        queries=1, dtype="bfloat16", heads=(7, 1), keys=333, head_dim=36, value_dim=5, softcap=50.0, int8=True
    ),
    "exact, int8, window": Case(window=100, queries=150, heads=(3, 1), int8=True),
    "exact, int8, odd sizes, bfloat16": Case(
        dtype="bfloat16", heads=(5, 1), queries=33, keys=131, head_dim=80, value_dim=33, causal=False, int8=True
    ),
    "exact, odd sizes, softcap": Case(heads=(7, 1), queries=50, keys=333, head_dim=36, value_dim=5, softcap=50.0),
    "exact, head size 256, bidirectional": Case(heads=(1, 1), queries=70, keys=200, head_dim=256, causal=False),
    "exact, bfloat16": Case(dtype="bfloat16", head_dim=32),
    "exact, bfloat16, odd sizes": Case(
        dtype="bfloat16", heads=(5, 1), queries=33, keys=131, head_dim=80, value_dim=33, causal=False
    ),
    "exact, window": Case(window=100, queries=200, batch=3),
    "exact, window, one query": Case(window=300, queries=1, heads=(3, 3)),
    "exact, window, odd sizes, softcap": Case(
        window=37, heads=(7, 1), queries=150, keys=333, head_dim=36, value_dim=5, causal=False, softcap=50.0
    ),
    "exact, window, bfloat16": Case(window=90, dtype="bfloat16", queries=200),
    "exact, window, bfloat16, bidirectional": Case(
        window=20, dtype="bfloat16", heads=(5, 1), queries=133, keys=331, head_dim=80, value_dim=33, causal=False
    ),
    "two-stage": Case(two_stage=SMALL, batch=3, value_dim=24),
    "two-stage, bidirectional": Case(two_stage=SMALL, causal=False, queries=130, keys=395),
    "two-stage, odd sizes, softcap": Case(
        two_stage=SMALL | HALF, heads=(3, 1), queries=90, keys=333, head_dim=36, value_dim=7, softcap=50.0
    ),
    "two-stage, small blocks": Case(two_stage=SMALL | {"key_block": 1, "crossover": 200}, heads=(6, 1), head_dim=128),
    "two-stage, many directions": Case(two_stage=SMALL | {"key_block": 2, "method": LowRank(rank=70)}, head_dim=128),
    "two-stage, large blocks": Case(
        two_stage=SMALL | HALF | {"key_block": 16, "candidates": 2.0, "local": 0}, keys=395
    ),
    "two-stage, budget above the keys": Case(two_stage=SMALL | {"budget": 512}, queries=40, keys=135),
    "two-stage, by mass": Case(two_stage=SMALL | {"mass": 0.9, "budget": (40, 400)}, batch=3, value_dim=24),
    "two-stage, by mass, bidirectional": Case(
        two_stage=SMALL | HALF | {"mass": 0.6, "budget": (40, 200)}, causal=False, queries=130, keys=395
    ),
    "two-stage, by mass, odd sizes, softcap": Case(
        two_stage=SMALL | HALF | {"mass": 0.95, "budget": (48, 100), "key_block": 1, "local": 3},
        **{"heads": (3, 1), "queries": 90, "keys": 333, "head_dim": 36, "value_dim": 7, "softcap": 50.0},
    ),
    "two-stage, by mass, bfloat16": Case(
        two_stage=SMALL | {"mass": 0.8, "budget": (96, 400)}, dtype="bfloat16", heads=(8, 1), queries=50
    ),
    "two-stage, by mass, int8": Case(two_stage=SMALL | {"mass": 0.8, "budget": (40, 400)}, value_dim=24, int8=True),
    "two-stage, int8": Case(two_stage=SMALL, value_dim=24, int8=True),
    "two-stage, bfloat16": Case(two_stage=SMALL | MORE, dtype="bfloat16", heads=(8, 1), queries=50),
    "two-stage, bfloat16, bidirectional": Case(
        two_stage=SMALL, dtype="bfloat16", heads=(2, 1), causal=False, head_dim=256, value_dim=31, queries=40, keys=203
    ),
}
USUAL = (
    "exact, one query, int8, odd sizes, softcap, bfloat16",
    "exact, window, odd sizes, softcap",
    "two-stage, int8",
    "two-stage, bfloat16",
)
"""Cases that are not slow. After a change of the kernels, all are run."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
KINDS = ["normal", "flat", "sharp", "huge logits", "zero queries", "repeated keys"]
PLACES = ["end", "middle", "start", "behind the end"]
"""Of the queries, among a row's tokens."""
ROWS = st.tuples(st.integers(0, 430), st.sampled_from(PLACES))
LONG_ROW = st.tuples(st.integers(340, 430), st.sampled_from(PLACES[:2]))
"""A row that is long enough for a selection in every case that has one."""


@functools.cache
def in_xla(name: str) -> Callable[..., Array]:
    """A case in XLA, as a function of arrays, constants, offsets and lengths."""
    case = CASES[name]
    options: dict[str, Any] = {"causal": case.causal, "softcap": case.softcap}

    def call(*arrays: Array, constants: dict[str, Array], offset: Array, lengths: Array) -> Array:
        rows = {"offset": offset, "lengths": lengths}
        with kernels.disabled():
            if case.two_stage is None:
                return exact_attention(*arrays, window=case.window, **rows, **options)
            return two_stage_attention(TwoStage(**case.two_stage), *arrays, constants=constants, **rows, **options)

    return jax.jit(call)


def native(
    name: str, query: Array, keys: KeyView, rows: Rows, constants: dict[str, Array]
) -> Float[Array, "rows heads queries value_dim"]:
    """A case with the kernels, wherever keys and values lie.

    Not under jit: so every array of the custom call is an allocation of its own, and a sanitizer sees who reads past
    its end.
    """
    case = CASES[name]
    strategy = Exact() if case.two_stage is None else TwoStage(**case.two_stage)
    mask = Mask(case.causal, case.window, softcap=case.softcap)
    call = Call(query, keys, rows, mask, constants)
    assert strategy.objection(call) is None
    return strategy.attend_in_kernel(call)


def inputs(case: Case, seed: int, kind: str = "normal") -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
    """Queries, keys, values, and the method's constants calibrated to them."""
    query, key, value = random_inputs(seed, case.batch, *case.heads, case.queries, case.keys, case.head_dim)
    value = np.random.default_rng(seed).standard_normal((*key.shape[:3], case.value_dim or case.head_dim), np.float32)
    query *= {"flat": 0.3, "sharp": 4.0, "huge logits": 50.0}.get(kind, 1.0)
    key *= 50.0 if kind == "huge logits" else 1.0
    if kind == "zero queries":
        query[:, :, ::2] = 0.0
    if kind == "repeated keys":
        # Equal keys have equal values: whichever of them are selected, the output is the same.
        repeated = np.random.default_rng(seed).integers(0, 5, case.keys)
        key, value = key[:, :, repeated], value[:, :, repeated]
    method = (case.two_stage or {}).get("method", LowRank())
    tokens = min(case.queries, case.keys)
    constants = method.calibrate(query[0, :, :tokens], key[0, :, :tokens])
    if case.int8:
        key, value = (np.asarray(as_floats(*quantize(jnp.asarray(x)), jnp.float32)) for x in (key, value))
    arrays = jnp.asarray(query, case.dtype), jnp.asarray(key, case.dtype), jnp.asarray(value, case.dtype)
    return arrays, {name: jnp.asarray(x) for name, x in constants.items()}


def as_int8(keys: KeyView) -> KeyView:
    """The same in int8. What is NaN in memory gets a scale that is."""

    def stored(x: Array) -> tuple[Array, Array]:
        rounded, scale = quantize(jnp.nan_to_num(x))
        return rounded, jnp.where(jnp.isnan(x).any(axis=-1), jnp.nan, scale)

    (key, key_scale), (value, value_scale) = stored(keys.key), stored(keys.value)
    return keys._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)


def tolerance(case: Case, query: Array, key: Array) -> float:
    """A logit is rounded relative to |query| |key|, and the weights are off by as much as the logit: by one rounding of
    the largest, and by more where logits are huge. Over int8, a decoding step may round queries to 15 bits and weights
    to 16."""
    norms = [float(jnp.max(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))) for x in (query, key)]
    largest = norms[0] * norms[1] / case.head_dim**0.5
    if case.int8 and case.queries == 1:
        return TOLERANCE[case.dtype] + 6e-5 * (1 + largest)
    return TOLERANCE[case.dtype] + (2e-6 if largest > 1e3 else 1.2e-7) * largest


@pytest.mark.parametrize("name", few(CASES, USUAL))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    kind=st.sampled_from(KINDS),
    rows=st.tuples(LONG_ROW, ROWS, ROWS),
    page=st.sampled_from([0, 128, 256]),
)
def test_agrees_with_xla(name: str, seed: int, kind: str, rows: tuple[tuple[int, str], ...], page: int) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    case = CASES[name]
    arrays, constants = inputs(case, seed, kind)
    lengths = np.array([length for length, _ in rows[: case.batch]], np.int32)
    valid = np.minimum(lengths, case.keys)
    before = np.maximum(valid - case.queries, 0)
    offset = np.array(
        [
            {"end": before[row], "middle": before[row] * 2 // 3, "start": 0}.get(place, valid[row] + 3)
            for row, (_, place) in enumerate(rows[: case.batch])
        ],
        np.int32,
    )
    query, key, value = arrays
    # What is kept, and not what it was rounded from, which bfloat16 had rounded before.
    kept = [as_floats(*quantize(x), query.dtype) for x in (key, value)] if case.int8 else [key, value]
    expected = in_xla(name)(query, *kept, constants=constants, offset=jnp.asarray(offset), lengths=jnp.asarray(lengths))
    expected = np.asarray(expected, np.float32)
    assert np.isfinite(expected).all()
    keys, slot = scattered(key, value, page, seed)
    keys = as_int8(keys) if case.int8 else keys
    # With pages there is memory behind the keys.
    rows_of_call = Rows(slot, jnp.asarray(offset), jnp.asarray(valid if page else lengths))
    if kind == "huge logits" and case.dtype == "bfloat16" and (case.two_stage or {}).get("mass"):
        atol = np.inf  # Rounding decides which of two keys has all of a query's weight, and so which may be left out.
    else:
        atol = tolerance(case, *arrays[:2])
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            output = np.asarray(native(name, query, keys, rows_of_call, constants), np.float32)
        assert np.isfinite(output).all()
        for row in range(case.batch):
            # Under the causal mask and in a window queries from `lengths` on are padding: nobody promises their rows.
            padded = case.causal or case.window is not None
            count = np.clip(valid[row] - offset[row], 0, case.queries) if padded else case.queries
            np.testing.assert_allclose(
                output[row, :, :count], expected[row, :, :count], atol=atol, err_msg=instruction_set
            )


@pytest.mark.skipif("ICEFORMER_SANITIZED" not in os.environ, reason="is for scripts/sanitize.sh")
def test_the_library_is_the_sanitized_one() -> None:
    assert kernels.version()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libiceformer" in line}
    assert loaded == {os.environ["ICEFORMER_KERNELS"]}
    assert b"__asan_report_load" in Path(os.environ["ICEFORMER_KERNELS"]).read_bytes()


def test_log_sum_exp_is_that_of_the_visible_logits() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    query, key, value = map(jnp.asarray, random_inputs(0, 2, 4, 2, 20, 50, 16))
    rows = Rows.whole(jnp.array([50, 0], jnp.int32))._replace(offset=jnp.array([30, 0], jnp.int32))
    _, lse = custom_calls.exact(Call(query, KeyView(key, value), rows, Mask(scale=0.25)))
    logits = jnp.einsum("hqd,hkd->hqk", query[0], jnp.repeat(key[0], 2, axis=0)) * 0.25
    visible = jnp.arange(50)[None, :] <= 30 + jnp.arange(20)[:, None]
    expected = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(lse[0], expected, atol=1e-5)
    assert (lse[1] == np.finfo(np.float32).min).all(), "a query that sees no key"


@pytest.mark.parametrize("page", [0, 256])
@pytest.mark.parametrize("window", [None, 1500])
def test_decoding_merges_the_parts_of_long_rows(window: int | None, page: int) -> None:
    """Rows that end before, at and behind the end of a part; against numpy, and each row alone to the bit."""
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    lengths = np.array([1, 1024, 1025, 3000], np.int32)
    query, key, value = random_inputs(0, 4, 6, 2, 1, 3000, 32)
    key *= np.linspace(0.2, 3.0, 3000, dtype=np.float32)[:, None]  # The largest logit grows from part to part.
    offset = lengths - 1
    expected = naive_attention(query, key, value, offset=offset, lengths=lengths, causal=True, window=window)
    keys, slot = scattered(jnp.asarray(key), jnp.asarray(value), page, 1)
    rows, mask = Rows(slot, jnp.asarray(offset), jnp.asarray(lengths)), Mask(window=window)
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            output, lse = custom_calls.exact(Call(jnp.asarray(query), keys, rows, mask))
            np.testing.assert_allclose(output, expected, atol=1e-5)
            for row in range(4):
                one = np.s_[row : row + 1]
                alone = Call(jnp.asarray(query[one]), keys, Rows(*(x[one] for x in rows)), mask)
                for part, whole in zip(custom_calls.exact(alone), (output, lse), strict=True):
                    np.testing.assert_array_equal(part, whole[one])


@pytest.mark.parametrize(
    ("rank", "key_block", "group", "softcap", "page"),
    few(
        [(32, 8, 3, None, 0), (16, 8, 4, 20.0, 128), (64, 4, 1, None, 0), (12, 1, 2, None, 128), (8, 32, 7, 30.0, 0)],
        [(16, 8, 4, 20.0, 128)],
    ),
)
@pytest.mark.parametrize("mass", [0.0, 0.6])
def test_key_blocks_chosen_are_those_of_xla(
    rank: int, key_block: int, group: int, softcap: float | None, page: int, mass: float
) -> None:
    """Rows that choose among many blocks and among few, one that attends exactly, and an idle one."""
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    config = DecodeSelection(LowRank(rank=rank), 192, mass, key_block=key_block, sink=5, local=40)
    query, key, value = random_inputs(3, 5, 2 * group, 2, 1, 1500, 64)
    constants = {name: jnp.asarray(x) for name, x in config.calibrate(query[0].repeat(64, 1), key[0, :, :64]).items()}
    keys, slot = scattered(jnp.asarray(key), jnp.asarray(value), page, 1)
    if not page:
        keys = keys.padded(32)
    keys = config.indexed(keys._replace(key=jnp.nan_to_num(keys.key)), constants)
    length = jnp.array([1500, 193, 192, 700, 1500], jnp.int32)
    rows = Rows(slot.at[4].set(-1), length - 1, length)
    call = Call(jnp.asarray(query), keys, rows, Mask(softcap=softcap), constants)
    expected = config.choose(config.prepared(call._replace(rows=rows.settled())))
    projected = config.ranking.projected_queries(split_queries(call.query, 2, 1), constants)[:, 0]  # type: ignore[attr-defined]
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            blocks, counts = custom_calls.choose(config, call, projected)
        np.testing.assert_array_equal(counts, expected.counts, err_msg=instruction_set)
        np.testing.assert_array_equal(blocks, expected.blocks, err_msg=instruction_set)
    np.testing.assert_array_equal(expected.counts.reshape(5, 2).min(axis=1) > 0, [True, True, False, True, False])


def test_a_key_of_overwhelming_weight_that_is_not_selected_does_not_wipe_out_the_others() -> None:
    # One query gives nearly all its weight to keys that the budget has no room for beside those of the other queries.
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    name = "two-stage, bidirectional"
    case = CASES[name]
    (query, key, value), constants = inputs(case, 5)
    key = key * 60.0
    rows = Rows.whole(jnp.full(2, case.keys, jnp.int32))
    expected = in_xla(name)(query, key, value, constants=constants, offset=rows.offset, lengths=rows.length)
    output = native(name, query, KeyView(key, value), rows, constants)
    np.testing.assert_allclose(output, expected, atol=1e-4)


@pytest.mark.parametrize("page", [0, 128])
@pytest.mark.parametrize("name", ["exact", "exact, window", "two-stage", "exact, bfloat16"])
def test_idle_rows_read_nothing(name: str, page: int) -> None:
    """Each row of the call by turns, the others idle: the output is the row's own, and 0."""
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    case = CASES[name]
    (query, key, value), constants = inputs(case, 6)
    keys, slot = scattered(key, value, page, 7)
    length = jnp.full(case.batch, case.keys, jnp.int32)
    rows = Rows(slot, length - case.queries, length)
    all_of_them = native(name, query, keys, rows, constants)
    for row in range(case.batch):
        only = jnp.arange(case.batch) == row
        output = native(name, query, keys, rows._replace(slot=jnp.where(only, slot, -1)), constants)
        np.testing.assert_array_equal(output, jnp.where(only[:, None, None, None], all_of_them, 0))


def test_a_page_may_belong_to_several_slots() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    query, key, value = map(jnp.asarray, random_inputs(0, 2, 4, 2, 20, 256, 16))
    rows = Rows.whole(jnp.array([256, 200], jnp.int32))._replace(offset=jnp.array([236, 180], jnp.int32))
    same_start = [x.at[1, :, :128].set(x[0, :, :128]) for x in (key, value)]
    expected, _ = custom_calls.exact(Call(query, KeyView(same_start[0], same_start[1]), rows))
    pages = [x.reshape(2, 2, 2, 128, 16).swapaxes(1, 2).reshape(4, 2, 128, 16) for x in (key, value)]
    keys = KeyView(pages[0], pages[1], {}, jnp.array([[0, 1], [0, 3]], jnp.int32))
    output, _ = custom_calls.exact(Call(query, keys, rows))
    np.testing.assert_array_equal(output, expected)


def test_an_unknown_instruction_set_is_refused() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    with pytest.raises(ValueError, match="expected one of: "), kernels.using("abacus"):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_block": 0}, "query_block: expected 1 to 2\\^31 - 1"),
        ({"query_block": 2**62}, "query_block: expected 1 to 2\\^31 - 1"),
        ({"window": -1}, "window: 0 to 2\\^31 - 1"),
        ({"head_dim": 7}, "an even head_dim"),
        ({"kv_heads": 3}, "query_heads a multiple of kv_heads"),
        ({"page": 0}, None),
        ({"slot": -1}, None),
        ({"slot": -2}, "slot: expected one of the slots, or -1"),
        ({"slot": 3}, "slot: expected one of the slots, or -1"),
        ({"page": 128, "table": [[0, 2]]}, None),
        ({"page": 128, "table": [[0, 3]]}, "table: expected one of the pages"),
        ({"page": 128, "table": [[-1, 0]]}, "table: expected one of the pages"),
        ({"page": 128, "table": [[0, 3]], "length": 128}, None),
        ({"page": 128, "table": [[0, 1]], "slot": 1}, "slot: expected one of the slots, or -1"),
        ({"page": 64, "table": [[0, 1]]}, "pages of a power of two of at least 128 tokens"),
        ({"page": 192, "table": [[0, 1]]}, "pages of a power of two of at least 128 tokens"),
    ],
    ids=str,
)
def test_calls_that_do_not_fit_are_refused(changed: dict[str, Any], message: str | None) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    size = {"query_block": 16, "window": 0, "head_dim": 8, "kv_heads": 2, "page": 5, "slot": 0, "length": 200} | changed
    query = jnp.ones((1, 4, 3, size["head_dim"]))
    key = jnp.zeros((3, size["kv_heads"], size["page"], size["head_dim"]))
    scales = jnp.zeros((0, 0, 0))
    results = (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32))
    options = {"query_block": np.int64(size["query_block"]), "window": np.int64(size["window"]), "causal": True}
    call = jax.ffi.ffi_call(kernels.EXACT, results)
    slot, offset, length = (jnp.array([x], jnp.int32) for x in (size["slot"], 0, size["length"]))
    table = jnp.array(size.get("table", [[]]), jnp.int32)
    # A call that runs at once raises ValueError.
    errors = (ValueError, jax.errors.JaxRuntimeError)
    refused = pytest.raises(errors, match=message) if message else nullcontext()
    with refused:
        output, _ = call(
            *(query, key, key, scales, scales, slot, offset, length, table),
            scale=np.float32(1),
            softcap=np.float32(0),
            **options,
        )
        assert (output == 0).all()


TWO_STAGE_SHAPES: dict[str, tuple[int, ...]] = {
    "query": (2, 4, 20, 8),
    "key": (2, 2, 24, 8),
    "value": (2, 2, 24, 5),
    "key_scale": (0, 0, 0),
    "value_scale": (0, 0, 0),
    "projected": (2, 2, 24, 12),
    "projected_queries": (4, 3, 16, 12),
    "offsets": (0, 0, 0),
    "selecting": (2, 2),
    "slot": (2,),
    "offset": (2,),
    "length": (2,),
    "table": (0, 0),
}
TWO_STAGE_OPTIONS: dict[str, int] = {
    "query_block": 8,
    "budget": 16,
    "key_block": 4,
    "candidate_blocks": 4,
    "sink": 4,
    "local": 0,
    "ranking_queries": 16,
    "least": 16,
}
TYPES = {"projected": "int8"} | dict.fromkeys(("selecting", "slot", "offset", "length", "table"), "int32")


def call_two_stage(changed: dict[str, Any]) -> Array:
    """The output of the custom call for arrays of zeros, after a change of their shapes or types, or of options."""
    shapes = {name: changed.get(name, shape) for name, shape in TWO_STAGE_SHAPES.items()}
    types = {name: changed.get("types", {}).get(name, TYPES.get(name, "float32")) for name in shapes}
    options = {name: np.int64(changed.get(name, value)) for name, value in TWO_STAGE_OPTIONS.items()}
    output = (2, 4, 20, 5)
    results = (jax.ShapeDtypeStruct(output, jnp.float32), jax.ShapeDtypeStruct(output[:3], jnp.float32))
    arrays = [jnp.zeros(shape, types[name]) for name, shape in shapes.items()]
    call = jax.ffi.ffi_call(kernels.TWO_STAGE, results)
    options |= {"causal": True, "scale": np.float32(1), "softcap": np.float32(0)}
    options["mass"] = np.float32(changed.get("mass", 0.0))
    return call(*arrays, **options)[0].block_until_ready()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": (2, 4, 20, 6)}, "expected query"),
        ({"query": (2, 3, 20, 8)}, "expected query"),
        ({"query": (2, 4, 160)}, "expected four axes"),
        ({"key": (2, 2, 20, 8)}, "expected query"),
        ({"key": (3, 2, 24, 8)}, "expected query"),
        ({"value": (2, 2, 24, 6)}, "expected query"),
        ({"value": (2, 2, 20, 5)}, "expected query"),
        ({"offset": (1,)}, "expected query"),
        ({"length": (3,)}, "expected query"),
        ({"slot": (1,)}, "expected query"),
        ({"types": {"key": "int8", "value": "int8"}}, "key_scale, value_scale: expected"),
        ({"types": {"key": "int8"}}, "key and value: that, or int8"),
        ({"projected": (2, 2, 20, 12)}, "expected projected"),
        ({"projected": (2, 1, 24, 12)}, "expected projected"),
        ({"projected": (1, 2, 24, 12)}, "expected projected"),
        ({"selecting": (2, 1)}, "expected projected"),
        ({"selecting": (1, 2)}, "expected projected"),
        ({"projected": (2, 2, 24, 8)}, "expected projected"),
        ({"projected": (2, 2, 24, 10), "projected_queries": (4, 3, 16, 10)}, "expected projected"),
        ({"projected": (2, 2, 24, 0), "projected_queries": (4, 3, 16, 0)}, "expected projected"),
        ({"projected": (2, 2, 288)}, "rank"),
        ({"projected_queries": (2, 3, 16, 12)}, "expected projected"),
        ({"projected_queries": (4, 2, 16, 12)}, "expected projected"),
        ({"projected_queries": (4, 3, 8, 12)}, "expected projected"),
        ({"projected_queries": (4, 3, 16, 16)}, "expected projected"),
        ({"key_block": 5}, "page one of key_block"),
        ({"key_block": 0}, "key_block, budget, candidate_blocks: expected 1"),
        ({"query_block": 2**40}, "key_block, budget, candidate_blocks: expected 1"),
        ({"budget": 0}, "key_block, budget, candidate_blocks: expected 1"),
        ({"candidate_blocks": -1}, "key_block, budget, candidate_blocks: expected 1"),
        ({"sink": -1}, "sink, local: 0"),
        ({"local": 2**62}, "sink, local: 0"),
        ({"least": 0}, "least: 1 to the budget"),
        ({"least": 17}, "least: 1 to the budget"),
        ({"mass": 0.5}, "offsets .heads, blocks, lanes. by mass"),
        ({"mass": 0.5, "offsets": (4, 3, 8)}, "offsets .heads, blocks, lanes. by mass"),
        ({"mass": 1.0}, "mass: 0 to below 1"),
        ({"mass": np.nan}, "mass: 0 to below 1"),
        ({"ranking_queries": 0}, "1 to all of the lanes"),
        ({"ranking_queries": 17}, "1 to all of the lanes"),
        ({"types": {"projected": "float32"}}, "dtype"),
        ({"types": {"length": "float32"}}, "dtype"),
        ({"types": {"key": "bfloat16"}}, "key and value: that, or int8"),
        ({"types": {"query": "float16", "key": "float16", "value": "float16"}}, "expected float32 or bfloat16"),
    ],
    ids=str,
)
def test_two_stage_calls_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_two_stage(changed)


def test_a_two_stage_call_that_fits_is_not_refused() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    assert (call_two_stage({}) == 0).all()
