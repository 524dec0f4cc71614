"""What memory holds past the end of a row changes nothing: NaN, infinities and large numbers there leave every valid
output as it was, bit for bit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import LowRank, MeanPool, TwoStage

from .calls import exact_attention, project_keys, two_stage_attention

KEYS, HEAD_DIM = 300, 16
BASIS = jnp.asarray(np.random.default_rng(5).standard_normal((2, 2, HEAD_DIM, 8)), jnp.float32)
BIAS = jnp.asarray(np.random.default_rng(6).standard_normal((4, 41)), jnp.float32)
SMALL: dict[str, Any] = {"budget": 60, "query_block": 8, "key_block": 4, "sink": 4, "local": 4}
LAST_TOO: dict[str, Any] = {**SMALL, "exact_last_block": False}
# So few candidates that all are taken, those past the end of the last key block too.
FEW: dict[str, Any] = {**LAST_TOO, "candidates": 1.0}
STRATEGIES = {
    "exact": partial(exact_attention, query_block=16, key_block=32),
    "exact, softcap": partial(exact_attention, softcap=5.0),
    "window": partial(exact_attention, window=30, query_block=16, key_block=32),
    "bias": partial(exact_attention, relative_bias=BIAS, key_block=64),
    "low_rank": partial(two_stage_attention, TwoStage(method=LowRank(rank=8), **SMALL), basis=BASIS),
    "low_rank, last block too": partial(two_stage_attention, TwoStage(method=LowRank(rank=8), **LAST_TOO), basis=BASIS),
    "low_rank, few candidates": partial(two_stage_attention, TwoStage(method=LowRank(rank=8), **FEW), basis=BASIS),
    "mean_pool": partial(two_stage_attention, TwoStage(method=MeanPool(), **SMALL)),
    "mean_pool, last block too": partial(two_stage_attention, TwoStage(method=MeanPool(), **FEW)),
    "block means": partial(
        two_stage_attention, TwoStage(method=MeanPool(), compensation="block_mean", **LAST_TOO), softcap=5.0
    ),
    "bias, two-stage": partial(two_stage_attention, TwoStage(method=MeanPool(), **LAST_TOO), relative_bias=BIAS),
}
# Queries of the call, offsets and lengths of three rows. The chunk fills no whole number of query blocks, and ends
# before, at and after the end of its row.
CALLS = {
    "chunk": (20, (100, 200, 250), (300, 220, 259)),
    "prompt": (300, (0, 0, 0), (300, 277, 70)),
    "decode": (1, (99, 299, 0), (100, 300, 1)),
}


KERNELS = ("exact", "exact, softcap", "window", "low_rank", "low_rank, last block too", "low_rank, few candidates")
"""Strategies that the native kernels have."""
EVERY = [
    (strategy, call, causal, dtype)
    for strategy in STRATEGIES
    for call, causal, dtype in [
        ("chunk", True, "float32"),
        ("chunk", True, "bfloat16"),
        ("chunk", False, "float32"),
        ("prompt", True, "float32"),
        ("prompt", False, "float32"),
        ("decode", True, "float32"),
    ]
]
USUAL = ("exact", "window", "bias", "low_rank, few candidates", "block means")
"""Not slow in a chunk."""


@pytest.mark.parametrize(
    ("strategy", "call", "causal", "dtype"),
    [pytest.param(*x, marks=() if x[0] in USUAL and x[1:] == EVERY[0][1:] else pytest.mark.slow) for x in EVERY],
)
def test_nothing_past_the_end_of_a_row_counts(form: str, strategy: str, call: str, causal: bool, dtype: str) -> None:
    if form == "kernels" and strategy not in KERNELS:
        pytest.skip("runs in XLA only")
    queries, offset, lengths = CALLS[call]
    positions = np.arange(KEYS)
    rng = np.random.default_rng(0)
    shapes = [(3, 4, queries, HEAD_DIM), (3, 2, KEYS, HEAD_DIM), (3, 2, KEYS, HEAD_DIM)]
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ends = np.minimum(lengths, np.add(offset, queries)) if causal else np.array(lengths)
    past = (positions >= ends[:, None])[:, None, :, None]
    padding = (np.arange(queries) >= np.subtract(lengths, offset)[:, None])[:, None, :, None]
    rows = {"offset": jnp.array(offset, jnp.int32), "lengths": jnp.array(lengths, jnp.int32)}
    attend = jax.jit(partial(STRATEGIES[strategy], causal=causal))

    def output(poison: float) -> np.ndarray:
        arrays = [
            jnp.asarray(np.where(where, poison * x, x), dtype)
            for where, x in ((padding, query), (past, key), (past, value))
        ]
        projected = project_keys(jnp.asarray(key, dtype), BASIS)
        kept = (
            {"projected": jnp.where(past, -127 if np.isnan(poison) else 127, projected)} if "rank" in strategy else {}
        )
        found = attend(*arrays, **rows, **kept)
        return np.where(padding, 0, np.asarray(found.astype(jnp.float32)))

    expected = output(0.5)
    assert np.isfinite(expected).all()
    assert expected.any(axis=-1).sum() == (~padding).sum() * 4
    for poison in (np.nan, np.inf, -np.inf, 1e3):
        np.testing.assert_array_equal(output(poison), expected, err_msg=str(poison))
