"""Two-stage attention, read through its weights: with the identity as values, the output is the attention matrix."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer.attention import LowRank, MeanPool, Rows, TwoStage

from ..few import few
from .calls import XLA_IS_SLOW, attend, two_stage_attention
from .reference import naive_attention, random_inputs

KEYS, HEAD_DIM, BLOCK = 96, 16, 8
SMALL: dict[str, Any] = {"budget": 40, "query_block": BLOCK, "key_block": 4, "sink": 4, "local": 4}
BY_MASS: dict[str, Any] = {**SMALL, "budget": (24, 48)}
CONFIGS = {
    "low_rank": TwoStage(method=LowRank(rank=HEAD_DIM, query_share=1.0), **SMALL),
    "low_rank, fewer queries": TwoStage(method=LowRank(rank=HEAD_DIM, query_share=0.3), **SMALL),
    "low_rank, by mass": TwoStage(method=LowRank(rank=HEAD_DIM, query_share=0.3), mass=0.7, **BY_MASS),
    "mean_pool": TwoStage(method=MeanPool(), exact_last_block=False, **SMALL),
    "mean_pool, crossover": TwoStage(method=MeanPool(), exact_last_block=False, crossover=60, **SMALL),
    "mean_pool, by mass": TwoStage(method=MeanPool(), mass=0.7, **BY_MASS),
}
IN_KERNELS = ("low_rank", "low_rank, by mass", "low_rank, fewer queries")
"""The others run in XLA in both forms."""
FULL_RANK = jnp.broadcast_to(jnp.eye(HEAD_DIM), (2, 2, HEAD_DIM, HEAD_DIM))


@partial(jax.jit, static_argnums=0, static_argnames="causal")
def run(config, query, key, value, offset, lengths, causal):
    return two_stage_attention(
        config, query, key, value, offset=offset, lengths=lengths, causal=causal, basis=FULL_RANK
    )


run_attend = jax.jit(attend, static_argnums=0)


@pytest.fixture
def name(form: str, request: pytest.FixtureRequest) -> str:
    """Of a configuration."""
    if form == "kernels" and request.param not in IN_KERNELS:
        pytest.skip("runs in XLA only")
    return request.param


def attention_matrix(config, query, key, lengths, causal, offset=(0, 0)) -> np.ndarray:
    """[batch, heads, queries, keys]"""
    identity = jnp.broadcast_to(jnp.eye(KEYS), (*key.shape[:2], KEYS, KEYS))
    rows = jnp.asarray(offset, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return np.asarray(run(config, jnp.asarray(query), jnp.asarray(key), identity, *rows, causal=causal))


def visible(lengths: int, causal: bool) -> np.ndarray:
    keys = np.arange(KEYS)
    return (keys < lengths)[None, :] & ((keys[None, :] <= keys[:, None]) | (not causal))


@pytest.mark.parametrize(
    ("form", "name", "causal"),
    few(
        [
            *itertools.product(["xla"], CONFIGS, (True, False)),
            *itertools.product(["kernels"], IN_KERNELS, (True, False)),
        ],
        [
            ("xla", "mean_pool, crossover", True),
            ("xla", "mean_pool, by mass", False),
            ("kernels", "low_rank, fewer queries", True),
            ("kernels", "low_rank, by mass", False),
        ],
    ),
    indirect=["form"],
)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    lengths=st.tuples(st.integers(0, KEYS), st.integers(0, KEYS)),
    ties=st.booleans(),
)
def test_every_row_is_an_exact_softmax_over_a_shared_selection(seed, name, lengths, causal, ties) -> None:
    config = CONFIGS[name]
    query, key, _ = random_inputs(seed, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    if ties:
        key = np.round(key[..., :1].repeat(HEAD_DIM, axis=-1))
    weights = attention_matrix(config, query, key, lengths, causal)
    assert np.isfinite(weights).all()
    chosen = np.zeros(weights.shape, bool)
    for row, length in enumerate(lengths):
        allowed = visible(length, causal)
        assert not weights[row, :, :length][:, ~allowed[:length]].any(), "a masked key has weight"
        for start in range(0, length, BLOCK):
            queries = slice(start, min(start + BLOCK, length))
            for head in range(4):
                attended = np.asarray(weights[row, head, queries].any(axis=0))
                last_block = config.exact_last_block and queries.stop > length - BLOCK
                # 60 keys are no whole number of query blocks: the block that ends at 64 selects.
                few = max(config.least_keys, config.crossover)
                if last_block or length <= few or (causal and start + BLOCK <= few):
                    attended[:] = True
                else:
                    assert attended.sum() <= config.most_keys
                chosen[row, head, queries] = attended
                forced = np.asarray(allowed[queries].any(axis=0)) & (np.arange(KEYS) < config.sink)
                assert attended[forced].all(), "the sink is not selected"
                assert attended[queries].all(), "the query block itself is not selected"
    arguments: dict[str, Any] = {"offset": np.zeros(2, int), "lengths": np.array(lengths), "causal": causal}
    expected = naive_attention(
        query, key, np.broadcast_to(np.eye(KEYS), (2, 2, KEYS, KEYS)), chosen=chosen, **arguments
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(weights[row, :, :length], expected[row, :, :length], atol=2e-6)


@XLA_IS_SLOW
@pytest.mark.parametrize("causal", few([True, False], [True]))
def test_selects_the_tokens_of_the_largest_true_softmax_weight(causal) -> None:
    # With full-rank scores and candidates for everything, the selection must be the best there is.
    config = TwoStage(method=LowRank(rank=HEAD_DIM, query_share=1.0), candidates=4.0, exact_last_block=False, **SMALL)
    query, key, _ = random_inputs(3, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    weights = attention_matrix(config, query, key, (KEYS, KEYS), causal)
    identity = np.broadcast_to(np.eye(KEYS), (2, 2, KEYS, KEYS))
    exact = naive_attention(query, key, identity, offset=np.zeros(2, int), lengths=np.full(2, KEYS), causal=causal)
    start = 64
    importance = exact[:, :, start : start + BLOCK].max(axis=2)
    end = start + BLOCK if causal else start + BLOCK + config.local
    importance[..., : config.sink] = importance[..., start - config.local : end] = np.inf
    best = np.argsort(-importance, axis=-1)[..., : config.budget]
    attended = np.asarray(weights[:, :, start : start + BLOCK].any(axis=2))
    for row, head in np.ndindex(2, 4):
        assert set(np.flatnonzero(attended[row, head])) == set(best[row, head])


@pytest.mark.parametrize(
    ("form", "name", "causal"),
    few(
        [
            (form, *case)
            for form in ("xla", "kernels")
            for case in (
                ("low_rank", True),
                ("low_rank, fewer queries", False),
                ("mean_pool", True),
                ("mean_pool", False),
            )
        ],
        [("xla", "mean_pool", True), ("kernels", "low_rank, fewer queries", False)],
    ),
    indirect=["form", "name"],
)
def test_budget_for_every_key_equals_exact_attention(name, causal) -> None:
    config = TwoStage(**{**SMALL, "budget": 128}, method=CONFIGS[name].method, exact_last_block=False)
    query, key, value = random_inputs(4, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    rows: dict[str, Any] = {"offset": np.zeros(2, np.int32), "lengths": np.array([KEYS, 61], np.int32)}
    output = run(config, query, key, value, *(jnp.asarray(x) for x in rows.values()), causal=causal)
    expected = naive_attention(query, key, value, causal=causal, **rows)
    np.testing.assert_allclose(output[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(output[1, :, :61], expected[1, :, :61], atol=2e-6)


@pytest.mark.parametrize(
    ("form", "name"),
    few(
        itertools.product(("xla", "kernels"), ("low_rank, fewer queries", "mean_pool, crossover")),
        [("xla", "mean_pool, crossover"), ("kernels", "low_rank, fewer queries")],
    ),
    indirect=True,
)
def test_chunks_of_a_prompt_equal_one_call(name) -> None:
    config = CONFIGS[name]
    query, key, value = random_inputs(5, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    lengths = jnp.asarray([KEYS, 77], jnp.int32)
    whole = run(config, query, key, value, jnp.zeros(2, jnp.int32), lengths, causal=True)
    for start in range(0, KEYS, 32):
        # Keys that the chunk has not reached yet hold whatever the cache held before.
        later = (np.arange(KEYS) >= start + 32)[None, None, :, None]
        stale_key, stale_value = np.where(later, 7.0, key), np.where(later, 7.0, value)
        part = run(
            config,
            query[:, :, start : start + 32],
            *(jnp.asarray(x, jnp.float32) for x in (stale_key, stale_value)),
            jnp.full(2, start, jnp.int32),
            lengths,
            causal=True,
        )
        for row, length in enumerate((KEYS, 77)):
            valid = min(32, length - start)
            np.testing.assert_allclose(
                part[row, :, :valid], whole[row, :, start : start + valid], atol=2e-6, err_msg=f"row {row}"
            )


@pytest.mark.parametrize("start", [0, 24, 32, 64])
@pytest.mark.parametrize("lengths", [(KEYS, 20), (60, 10), (61, 61)])
def test_calls_that_select_nothing_take_the_exact_path_to_the_same_result(start, lengths) -> None:
    config = CONFIGS["mean_pool, crossover"]
    query, key, value = map(jnp.asarray, random_inputs(9, 2, 4, 2, KEYS, KEYS, HEAD_DIM))
    rows: dict[str, Any] = {"offset": jnp.full(2, start, jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32)}
    chunk = query[:, :, start : start + 32]
    output = run_attend(config, chunk, key, value, **rows)
    expected = run(config, chunk, key, value, **rows, causal=True)
    for row, length in enumerate(lengths):
        valid = max(0, length - start)
        np.testing.assert_allclose(output[row, :, :valid], expected[row, :, :valid], atol=2e-6)
    selecting = config.selecting(Rows(jnp.arange(2), *rows.values()), 32, True)
    selects = start + 32 > 60 and max(lengths) > max(60, start)
    assert (selecting.first < selecting.last).any() == selects


@XLA_IS_SLOW
def test_a_needle_is_found_by_low_rank_and_lost_by_block_means() -> None:
    rng = np.random.default_rng(6)
    key = rng.standard_normal((1, 1, KEYS, HEAD_DIM)).astype(np.float32)
    query = 0.1 * rng.standard_normal((1, 1, KEYS, HEAD_DIM)).astype(np.float32)
    needle, asking = 21, 85
    query[0, 0, asking] = 8.0 * key[0, 0, needle]
    key[0, 0, needle + 1] = -key[0, 0, needle]  # so that the mean of the needle's block shows nothing of it
    found = {}
    for method in (LowRank(rank=HEAD_DIM, query_share=1.0), MeanPool()):
        config = TwoStage(method=method, candidates=1.0, exact_last_block=False, **SMALL)
        call = partial(
            two_stage_attention,
            config,
            offset=jnp.zeros(1, jnp.int32),
            lengths=jnp.full(1, KEYS),
            basis=FULL_RANK[:1],
        )
        weights = jax.jit(call)(*map(jnp.asarray, (query, key, jnp.eye(KEYS)[None, None])))
        found[method.name] = float(weights[0, 0, asking, needle])
    assert found["low_rank"] > 0.9
    assert found["mean_pool"] < 0.1


def by_mass(mass: float, budget: tuple[int, int], **options: Any) -> TwoStage:
    """Key by key and with all queries, so that stage 1's estimates are exact but for rounding to int8."""
    method = LowRank(rank=HEAD_DIM, query_share=1.0)
    return TwoStage(method, budget, mass, key_block=1, query_block=BLOCK, sink=1, local=1, **options)


def selected_and_exact(config: TwoStage, query: Any, key: Any, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """What each block of each head selects [4, blocks, keys], and what its queries' exact weights are
    [4, blocks, block, keys]; the projections are scaled to what int8 holds."""
    identity, basis = jnp.eye(KEYS)[None, None].repeat(2, 1), FULL_RANK * jnp.asarray([1 / 20, 20.0])[:, None, None]
    rows = jnp.zeros(1, jnp.int32), jnp.full(1, KEYS)
    of_one_row: dict[str, Any] = {"offset": np.zeros(1, int), "lengths": np.full(1, KEYS)}
    call = partial(two_stage_attention, config, offset=rows[0], lengths=rows[1], causal=causal, basis=basis)
    weights = np.asarray(jax.jit(call)(jnp.asarray(query), jnp.asarray(key), identity))
    exact = naive_attention(query, key, np.asarray(identity), **of_one_row, causal=causal)
    weights, exact = (x.reshape(4, KEYS // BLOCK, BLOCK, KEYS) for x in (weights, exact))
    return np.asarray(weights.any(axis=2)), exact


@pytest.mark.parametrize(
    ("form", "mass", "causal"),
    few(
        itertools.product(("xla", "kernels"), (0.5, 0.9, 0.99), (True, False)),
        [("xla", 0.9, True), ("kernels", 0.9, True), ("kernels", 0.99, False)],
    ),
    indirect=["form"],
)
def test_by_mass_the_selected_keys_hold_it_and_not_much_more(mass, causal) -> None:
    query, key, _ = random_inputs(11, 1, 4, 2, KEYS, KEYS, HEAD_DIM)
    selected, exact = selected_and_exact(by_mass(mass, (1, 96), exact_last_block=False), 2 * query, key, causal)
    held = (exact * selected[:, :, None]).sum(axis=-1).mean(axis=-1)
    assert held.min() > mass - 0.01
    # Without the last of them, in the order of importance, it would not be enough: see each block's least needed key.
    mean = exact.mean(axis=2)
    importance = np.where(selected, mean * exact.max(axis=2), np.inf)
    for head, block in np.ndindex(*selected.shape[:2]):
        near = np.arange(KEYS) // BLOCK == block
        order = [k for k in np.argsort(importance[head, block]) if selected[head, block, k] and not near[k] and k > 1]
        if len(order) > 4:
            # Both stages together leave 1 - mass out; stage 1's estimates let it keep more than its half.
            assert held[head, block] - mean[head, block, order[:4]].sum() < 1 - (1 - mass) / 2


@XLA_IS_SLOW
def test_by_mass_a_head_that_looks_at_little_reads_little() -> None:
    query, key, _ = random_inputs(12, 1, 4, 2, KEYS, KEYS, HEAD_DIM)
    query[:, :2] *= 8
    query[:, 2:] *= 0.1
    selected, _ = selected_and_exact(by_mass(0.9, (12, 80), exact_last_block=False), query, key, False)
    peaked, diffuse = np.split(selected.sum(axis=2), 2)
    assert peaked.max() < 60
    assert diffuse.min() > 70
    assert diffuse.max() <= 80
    few, _ = selected_and_exact(by_mass(0.01, (30, 80), exact_last_block=False), query, key, False)
    assert (few.sum(axis=2) == 30).all()


@XLA_IS_SLOW
def test_by_mass_a_key_that_one_query_needs_is_selected() -> None:
    query, key, _ = random_inputs(13, 1, 4, 2, KEYS, KEYS, HEAD_DIM)
    query *= 0.3
    needle, asking = 21, 85
    query[0, 0, asking] = 4 * key[0, 0, needle]
    selected, exact = selected_and_exact(by_mass(0.5, (20, 96), exact_last_block=False), query, key, True)
    assert exact[0, asking // BLOCK, asking % BLOCK, needle] > 0.9
    assert exact[0, asking // BLOCK, :, needle].mean() < 0.2
    assert selected[0, asking // BLOCK, needle]


def test_block_mean_compensation_is_exact_where_left_out_keys_are_equal(form) -> None:
    if form == "kernels":
        pytest.skip("runs in XLA only")
    keys = 256
    config = TwoStage(method=MeanPool(), compensation="block_mean", exact_last_block=False, **SMALL)
    query, _, value = random_inputs(7, 1, 2, 2, keys, keys, HEAD_DIM)
    key = np.random.default_rng(7).standard_normal((1, 2, 4, 1, HEAD_DIM)).astype(np.float32)
    key = key.repeat(64, axis=3).reshape(1, 2, keys, HEAD_DIM)
    value = value.reshape(1, 2, 4, 64, HEAD_DIM).mean(axis=3, keepdims=True).repeat(64, 3).reshape(key.shape)
    rows: dict[str, Any] = {"offset": np.zeros(1, np.int32), "lengths": np.full(1, keys, np.int32)}
    expected = naive_attention(query, key, value, causal=True, **rows)
    arrays = [jnp.asarray(x) for x in (query, key, value, *rows.values())]
    compensated = run(config, *arrays, causal=True)
    # A block that the query block sees only in part is not compensated: look where the query block starts a new one.
    for start in (64, 128, 192):
        np.testing.assert_allclose(
            compensated[0, :, start : start + BLOCK], expected[0, :, start : start + BLOCK], atol=1e-5
        )
    plain = run(TwoStage(method=MeanPool(), exact_last_block=False, **SMALL), *arrays, causal=True)
    assert np.abs(np.asarray(plain) - expected).max() > 0.01


@XLA_IS_SLOW
def test_bfloat16_stays_near_float32() -> None:
    query, key, value = map(jnp.asarray, random_inputs(8, 2, 4, 2, KEYS, KEYS, HEAD_DIM))
    rows = (jnp.zeros(2, jnp.int32), jnp.full(2, KEYS, jnp.int32))
    config = TwoStage(**{**SMALL, "budget": 90}, method=CONFIGS["low_rank"].method)
    low = run(config, *(x.astype(jnp.bfloat16) for x in (query, key, value)), *rows, causal=True)
    assert low.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(low, np.float32) - np.asarray(run(config, query, key, value, *rows, causal=True)))
    assert np.quantile(difference, 0.99) < 0.05
