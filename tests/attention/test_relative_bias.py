"""Attention with a relative position bias, in the exact and in the two-stage form, against numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import Exact, LowRank, MeanPool, TwoStage

from ..few import few
from .calls import attend, exact_attention, two_stage_attention
from .reference import naive_attention, random_inputs

KEYS, HEAD_DIM, BLOCK = 96, 16, 8
SMALL: dict[str, Any] = {"budget": 40, "query_block": BLOCK, "key_block": 4, "sink": 4, "local": 4}
SMALL_BLOCKS = {"query_block": 8, "key_block": 16}
METHODS = {"low_rank": LowRank(rank=HEAD_DIM, query_share=1.0), "mean_pool": MeanPool()}
FULL_RANK = jnp.broadcast_to(jnp.eye(HEAD_DIM), (2, 2, HEAD_DIM, HEAD_DIM))

run = partial(jax.jit, static_argnums=0, static_argnames="causal")(partial(two_stage_attention, basis=FULL_RANK))


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """With a bias there is one form: the kernels have none."""


def random_bias(reach: int) -> np.ndarray:
    return (2 * np.random.default_rng(reach).standard_normal((4, 2 * reach + 1))).astype(np.float32)


@pytest.mark.parametrize(
    ("blocks", "causal", "reach"),
    [
        pytest.param({}, True, 5, marks=pytest.mark.slow),
        pytest.param({}, False, 200, marks=pytest.mark.slow),
        pytest.param(SMALL_BLOCKS, True, 200, marks=pytest.mark.slow),
        (SMALL_BLOCKS, False, 5),
    ],
    ids=str,
)
def test_exact_equals_numpy(blocks: dict[str, int], causal: bool, reach: int) -> None:
    query, key, value = random_inputs(0, 2, 4, 2, 40, 60, HEAD_DIM)
    rows: dict[str, Any] = {"offset": np.array([20, 3], np.int32), "lengths": np.array([60, 43], np.int32)}
    options: dict[str, Any] = {"causal": causal, "scale": 0.5, "softcap": 3.0}
    bias = random_bias(reach)
    arrays = {name: jnp.asarray(x) for name, x in {**rows, "relative_bias": bias}.items()}
    output = exact_attention(*map(jnp.asarray, (query, key, value)), **arrays, **options, **blocks)
    expected = naive_attention(query, key, value, **rows, **options, relative_bias=bias)
    np.testing.assert_allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "causal", "exact_last_block"),
    few([("low_rank", True, False), ("mean_pool", False, True)], [("low_rank", True, False)]),
)
def test_two_stage_is_an_exact_softmax_over_its_selection(method: str, causal: bool, exact_last_block: bool) -> None:
    config = TwoStage(method=METHODS[method], exact_last_block=exact_last_block, **SMALL)
    query, key, _ = random_inputs(1, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    rows: dict[str, Any] = {"offset": np.zeros(2, np.int32), "lengths": np.full(2, KEYS, np.int32)}
    identity, bias = np.broadcast_to(np.eye(KEYS, dtype=np.float32), (2, 2, KEYS, KEYS)), random_bias(9)
    arrays = {name: jnp.asarray(x) for name, x in {**rows, "relative_bias": bias}.items()}
    weights = np.asarray(run(config, *map(jnp.asarray, (query, key, identity)), **arrays, causal=causal))
    chosen = weights.reshape(2, 4, -1, BLOCK, KEYS).any(axis=3).repeat(BLOCK, axis=2)
    counts = chosen.sum(axis=-1)
    assert (counts[:, :, 80:88] == config.budget).all()
    expected = naive_attention(query, key, identity, **rows, causal=causal, chosen=chosen, relative_bias=bias)
    np.testing.assert_allclose(weights, expected, atol=2e-6)


def test_the_bias_decides_what_is_selected_among_candidates() -> None:
    """With keys that are all equal, and candidates for everything: the tokens at the distances of the largest bias."""
    config = TwoStage(method=MeanPool(), candidates=4.0, exact_last_block=False, **SMALL)
    bias = np.zeros((4, 2 * KEYS + 1), np.float32)
    bias[:, KEYS + 30] = 5.0
    query, key, _ = random_inputs(2, 1, 4, 2, KEYS, KEYS, HEAD_DIM)
    identity = jnp.broadcast_to(jnp.eye(KEYS), (1, 2, KEYS, KEYS))
    rows: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, KEYS)}
    equal = jnp.zeros_like(jnp.asarray(key))
    weights = run(config, jnp.asarray(query), equal, identity, **rows, causal=False, relative_bias=jnp.asarray(bias))
    for index in range(KEYS - 30):
        share = np.exp(5.0) / (np.exp(5.0) + config.budget - 1)
        np.testing.assert_allclose(weights[0, :, index, index + 30], share, rtol=1e-5)


STRATEGIES = [Exact(), TwoStage(method=METHODS["low_rank"], **SMALL)]


@pytest.mark.parametrize("config", few(STRATEGIES, STRATEGIES[1:]), ids=["exact", "two_stage"])
def test_attend_does_not_run_in_kernels(config: Any) -> None:
    """The native kernels would ignore the bias."""
    query, key, value = (jnp.asarray(x) for x in random_inputs(3, 1, 4, 2, KEYS, KEYS, HEAD_DIM))
    rows: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, KEYS)}
    call = jax.jit(partial(attend, config, causal=False, basis=FULL_RANK))
    bias = jnp.asarray(random_bias(3))
    text = call.lower(query, key, value, **rows, relative_bias=bias).as_text()
    assert "iceformer" not in text
    assert np.abs(call(query, key, value, **rows, relative_bias=bias) - call(query, key, value, **rows)).max() > 0.1


def test_refusals() -> None:
    query, key, value = (jnp.asarray(x) for x in random_inputs(4, 1, 4, 2, 8, 8, HEAD_DIM))
    rows: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, 8)}
    with pytest.raises(ValueError, match="relative_bias has 4 distances, expected an odd number"):
        exact_attention(query, key, value, **rows, relative_bias=jnp.zeros((4, 4)))
    config = TwoStage(method=MeanPool(), compensation="block_mean", **SMALL)
    with pytest.raises(ValueError, match="compensation is 'block_mean', which cannot go with a relative position bias"):
        two_stage_attention(config, query, key, value, **rows, relative_bias=jnp.zeros((4, 5)))
