"""Every pair of options of a call, in XLA and on every instruction set, against numpy in float64.

Options share shortcuts: a scale waits for the exponential unless a cap comes between, a mask is left out where all
queries see a key, a last tile is cut short. Each case sets all options at once, and together the cases hold every pair.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer import kernels
from iceformer.attention import Call, KeyView, LowRank, Mask, Rows, TwoStage, custom_calls

from .calls import exact_attention, two_stage_attention

Case = dict[str, Any]

SCALES, CAPS, GROUPS = (None, 1.0, 0.3, 0.0, -0.7), (None, 4.0, 60.0, 1e4), tuple(range(1, 9))
ROWS = ("whole", "ragged", "early", "empty", "beyond")
EXACT: dict[str, Sequence[Any]] = {
    "scale": SCALES,
    "softcap": CAPS,
    "group": GROUPS,
    "causal": (True, False),
    "window": (None, 1, 30),
    "head_dim": (2, 16, 36, 130),
    "value_dim": (1, 7, 16, 49),
    "queries": (1, 3, 19, 80),
    "keys": (1, 5, 140, 300),
    "rows": ROWS,
    "dtype": ("float32", "bfloat16"),
}
IN_XLA: dict[str, Sequence[Any]] = {**EXACT, "blocks": ((1, 1), (8, 16), (64, 32), (256, 512)), "reach": (None, 3, 400)}
TWO_STAGE: dict[str, Sequence[Any]] = {
    "scale": SCALES,
    "softcap": CAPS,
    "group": GROUPS,
    "causal": (True, False),
    "head_dim": (4, 16, 36),
    "queries": (1, 19, 80),
    "keys": (70, 200),
    "rows": ROWS,
    "dtype": ("float32", "bfloat16"),
    "key_block": (1, 4, 16),
    "query_block": (1, 8, 16),
    "query_share": (0.3, 1.0),
    "exact_last_block": (True, False),
}


def covering(options: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Cases in which any two values of different options meet: of random ones, always that with the most new pairs."""
    rng = np.random.default_rng(0)
    sizes = [len(values) for values in options.values()]
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    left = {(a, b, i, j) for a, b in pairs for i in range(sizes[a]) for j in range(sizes[b])}
    cases = []
    while left:
        candidates = rng.integers(0, sizes, (50, len(sizes)))
        a, b, i, j = min(left)
        candidates[:, [a, b]] = i, j
        news = [{(a, b, x[a], x[b]) for a, b in pairs} & left for x in candidates.tolist()]
        best = max(range(len(news)), key=lambda index: len(news[index]))
        left -= news[best]
        cases.append({name: options[name][i] for name, i in zip(options, candidates[best], strict=True)})
    return cases


def rows_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of two rows."""
    queries, keys = case["queries"], case["keys"]
    last = max(keys - queries, 0)
    offset, lengths = {
        "whole": ((last, last), (keys, keys)),
        "ragged": ((last, 0), (keys, keys * 2 // 3)),
        "early": ((0, last // 2), (keys, keys)),
        "empty": ((0, last), (0, keys)),
        "beyond": ((last, keys + 3), (keys + 9, keys)),
    }[case["rows"]]
    return np.array(offset, np.int32), np.array(lengths, np.int32)


def arrays_of(case: Case, value_dim: int) -> list[jax.Array]:
    """Query, key and value, with logits up to a few dozen."""
    rng = np.random.default_rng(list(repr(case).encode()))
    shapes = [
        (2, 2 * case["group"], case["queries"], case["head_dim"]),
        (2, 2, case["keys"], case["head_dim"]),
        (2, 2, case["keys"], value_dim),
    ]
    factors = (4.0 if case["scale"] is None else 8.0 * case["head_dim"] ** -0.5, 1.0, 1.0)
    return [jnp.asarray(x * rng.standard_normal(y), case["dtype"]) for x, y in zip(factors, shapes, strict=True)]


def reference(case: Case, arrays: Sequence[jax.Array], seen: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """softmax(cap(query . key * scale) + bias) . value over the keys in `seen` [batch, 1 or heads, queries, keys]."""
    query, key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    key, value = (x.repeat(case["group"], axis=1) for x in (key, value))
    logits = query @ key.swapaxes(2, 3) * (case["head_dim"] ** -0.5 if case["scale"] is None else case["scale"])
    if case["softcap"] is not None:
        logits = case["softcap"] * np.tanh(logits / case["softcap"])
    logits = np.where(seen, logits if bias is None else logits + bias, -np.inf)
    largest = np.maximum(logits.max(axis=-1, keepdims=True), -1e300)
    weights = np.exp(logits - largest)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300) @ value


def distances(case: Case) -> np.ndarray:
    """[batch, queries, keys]: key position - query position."""
    offset, _ = rows_of(case)
    return np.arange(case["keys"]) - (offset[:, None] + np.arange(case["queries"]))[..., None]


def visible(case: Case) -> np.ndarray:
    """[batch, 1, queries, keys]"""
    distance, (_, lengths) = distances(case), rows_of(case)
    seen = np.broadcast_to(np.arange(case["keys"]) < lengths[:, None, None], distance.shape).copy()
    if case["causal"]:
        seen &= distance <= 0
    if case.get("window"):
        seen &= abs(distance) < case["window"]
    return seen[:, None]


def promised(case: Case, padded: bool) -> np.ndarray:
    """[batch, 1, queries, 1]: the queries that mean something; where `padded`, those before the row's end."""
    offset, lengths = rows_of(case)
    end = np.minimum(lengths, case["keys"])[:, None] if padded else np.inf
    return (offset[:, None] + np.arange(case["queries"]) < end)[:, None, :, None]


def check(case: Case, output: jax.Array, expected: np.ndarray, rows: np.ndarray, where: str) -> None:
    found = np.asarray(output.astype(jnp.float32))
    # Of weights and outputs in bfloat16, and of float32 logits up to a few dozen.
    atol = 3e-2 if case["dtype"] == "bfloat16" else 2e-5
    np.testing.assert_allclose(np.where(rows, found, 0), np.where(rows, expected, 0), atol=atol, err_msg=where)


def options_of(case: Case) -> dict[str, Any]:
    offset, lengths = rows_of(case)
    named = {name: case[name] for name in ("scale", "softcap", "causal")}
    return {"offset": jnp.asarray(offset), "lengths": jnp.asarray(lengths), **named}


def name_of(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


def sweep(cases: Sequence[Case], default: int, mark: pytest.MarkDecorator) -> list[Any]:
    """All cases, of which the first few run by default."""
    marks = [() if index < default else (mark,) for index in range(len(cases))]
    return [pytest.param(case, marks=mark, id=name_of(case)) for case, mark in zip(cases, marks, strict=True)]


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """Each test says for itself in which form it runs."""


@pytest.mark.parametrize("case", sweep(covering(IN_XLA), 6, pytest.mark.slow))
def test_exact_in_xla(case: Case) -> None:
    arrays = arrays_of(case, case["value_dim"])
    bias = tiles = None
    if case["reach"] is not None:
        bias = np.random.default_rng(1).standard_normal((2 * case["group"], 2 * case["reach"] + 1)).astype(np.float32)
        tiles = bias[:, distances(case).clip(-case["reach"], case["reach"]) + case["reach"]].swapaxes(0, 1)
    query_block, key_block = case["blocks"]
    blocks = {"query_block": query_block, "key_block": key_block}
    with kernels.disabled():
        output = exact_attention(
            *arrays,
            **options_of(case),
            **blocks,
            window=case["window"],
            relative_bias=None if bias is None else jnp.asarray(bias),
        )
    rows = promised(case, padded=case["causal"] or case["window"] is not None)
    check(case, output, reference(case, arrays, visible(case), tiles), rows, "XLA")


@pytest.mark.parametrize("case", sweep(covering(EXACT), 16, pytest.mark.native))
def test_exact_in_kernels(case: Case) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    arrays = arrays_of(case, case["value_dim"])
    expected = reference(case, arrays, visible(case))
    rows = promised(case, padded=case["causal"] or case["window"] is not None)
    call = jax.jit(lambda *arrays: exact_attention(*arrays, **options_of(case), window=case["window"]))
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            output = call(*arrays)
            check(case, output, expected, rows, instruction_set)


def two_stage_inputs(case: Case) -> tuple[TwoStage, list[jax.Array]]:
    """A configuration, queries, keys, and the identity as values, so that the output is the attention matrix."""
    query, key, identity = arrays_of(case, case["keys"])
    config = TwoStage(
        method=LowRank(rank=6, query_share=case["query_share"]),
        budget=80,
        sink=2,
        local=2,
        **{name: case[name] for name in ("key_block", "query_block", "exact_last_block")},
    )
    return config, [query, key, jnp.broadcast_to(jnp.eye(case["keys"], dtype=identity.dtype), identity.shape)]


def check_two_stage(case: Case, config: TwoStage, arrays: Sequence[jax.Array], output: jax.Array, where: str) -> None:
    """That the output is the exact softmax over some keys that the queries of a block share, within the budget."""
    rows, seen = promised(case, padded=True), visible(case)
    weights = np.where(rows, np.asarray(output.astype(jnp.float32)), 0)
    assert np.isfinite(weights).all(), where
    # Of what the block's queries see, what gets no weight at all was not selected: it may be too light to show.
    size, queries, group = case["query_block"], case["queries"], case["group"]
    offset, lengths = rows_of(case)
    chosen = np.zeros((2, 2 * group, queries, case["keys"]), bool)
    for row, head, start in itertools.product(range(2), range(2), range(0, queries, size)):
        block = np.s_[row, group * head : group * (head + 1), start : start + size]
        attended = weights[block].any(axis=(0, 1))
        chosen[block] = attended
        length = min(lengths[row], case["keys"])
        last = config.exact_last_block and offset[row] + start + size > length - size
        few = length <= 80 or (case["causal"] and offset[row] + start + size <= 80)
        assert last or few or attended.sum() <= 80, where
    check(case, output, reference(case, arrays, seen & chosen), rows, where)


TWO_STAGE_CASES = covering(TWO_STAGE)


@pytest.mark.parametrize("case", sweep(TWO_STAGE_CASES, 1, pytest.mark.slow))
def test_two_stage_in_xla(case: Case) -> None:
    config, arrays = two_stage_inputs(case)
    basis = jnp.asarray(np.random.default_rng(2).standard_normal((2, 2, case["head_dim"], 4)), jnp.float32)
    with kernels.disabled():
        output = jax.jit(partial(two_stage_attention, config, **options_of(case), basis=basis))(*arrays)
    check_two_stage(case, config, arrays, output, "XLA")


@pytest.mark.parametrize("case", sweep(TWO_STAGE_CASES, 16, pytest.mark.native))
def test_two_stage_in_kernels(case: Case) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    config, arrays = two_stage_inputs(case)
    # Whatever stage 1 ranks by, what is selected is attended to exactly.
    rng, blocks = np.random.default_rng(3), -(-case["queries"] // case["query_block"])
    projected = rng.integers(-127, 128, (2, 2, case["keys"], 8))
    projected_queries = rng.standard_normal((4, blocks, case["group"] * case["query_block"], 8))
    arrays_of_ranking = jnp.asarray(projected, jnp.int8), jnp.asarray(projected_queries, jnp.float32)
    options = options_of(case)
    rows = Rows.whole(jnp.minimum(options["lengths"], case["keys"]))._replace(offset=options["offset"])
    mask = Mask(case["causal"], None, case["scale"], case["softcap"])
    selecting = config.selecting(rows, case["queries"], mask.causal)

    no_offsets = jnp.zeros((0, 0, 0), jnp.float32)

    @jax.jit
    def call(query: jax.Array, key: jax.Array, value: jax.Array, projected: jax.Array, queries: jax.Array) -> Any:
        keys = KeyView(key, value, {"projected_key": projected}).padded(config.key_block)
        return custom_calls.two_stage(config, Call(query, keys, rows, mask), queries, no_offsets, selecting)

    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            output, _ = call(*arrays, *arrays_of_ranking)
        check_two_stage(case, config, arrays, output, instruction_set)
