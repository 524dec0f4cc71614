"""Exact attention against plain numpy, over shapes, lengths and offsets."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer.attention import Exact, TwoStage
from iceformer.attention.exact import Partial, merge

from .calls import XLA_IS_SLOW, attend, exact_attention
from .reference import naive_attention, random_inputs

run = jax.jit(partial(exact_attention, query_block=8, key_block=16), static_argnames=("causal", "scale", "softcap"))


@pytest.mark.parametrize(
    ("heads", "sizes", "causal", "softcap"),
    [
        ((4, 2), (1, 40), True, None),
        pytest.param((1, 1), (1, 40), False, 2.0, marks=pytest.mark.slow),
        ((4, 2), (13, 40), False, None),
        pytest.param((1, 1), (13, 40), True, 2.0, marks=pytest.mark.slow),
        ((4, 2), (40, 40), True, 2.0),
        pytest.param((1, 1), (40, 40), False, None, marks=pytest.mark.slow),
    ],
)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 50),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_equals_numpy(seed, heads, sizes, offset, lengths, causal, softcap) -> None:
    query, key, value = random_inputs(seed, 2, heads[0], heads[1], sizes[0], sizes[1], 16)
    offsets = np.array([offset, 0], np.int32)
    rows = np.array(lengths, np.int32)
    output = np.asarray(
        run(query, key, value, offset=jnp.asarray(offsets), lengths=jnp.asarray(rows), causal=causal, softcap=softcap)
    )
    expected = naive_attention(query, key, value, offset=offsets, lengths=rows, causal=causal, softcap=softcap)
    assert np.isfinite(output).all()
    for row in range(2):
        # Queries from `lengths` on are padding under the causal mask: nobody promises their rows.
        valid = max(0, rows[row] - offsets[row]) if causal else sizes[0]
        np.testing.assert_allclose(output[row, :, :valid], expected[row, :, :valid], atol=2e-6)


def test_query_without_a_visible_key_gives_zero() -> None:
    query, key, value = map(jnp.asarray, random_inputs(0, 2, 2, 2, 4, 8, 16))
    rows: dict[str, Any] = {"offset": jnp.zeros(2, jnp.int32), "lengths": jnp.array([0, 8], jnp.int32)}
    output = np.asarray(exact_attention(query, key, value, **rows, causal=False))
    np.testing.assert_array_equal(output[0], 0.0)
    assert (np.abs(output[1]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("fill", [0.0, 3e4])
def test_ties_and_large_logits_stay_finite(fill) -> None:
    query = jnp.full((1, 1, 4, 16), fill)
    value = jnp.asarray(np.eye(8, 16, dtype=np.float32))[None, None]
    output = exact_attention(
        query, jnp.ones((1, 1, 8, 16)), value, offset=jnp.full(1, 4), lengths=jnp.full(1, 8), causal=True
    )
    for index in range(4):
        np.testing.assert_allclose(np.asarray(output)[0, 0, index, : 5 + index], 1 / (5 + index), rtol=1e-6)


@XLA_IS_SLOW
def test_bfloat16_stays_near_float32() -> None:
    query, key, value = map(jnp.asarray, random_inputs(1, 1, 4, 2, 40, 40, 64))
    arguments: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, 40), "causal": True}
    low = exact_attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), **arguments)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(low, np.float32), np.asarray(exact_attention(query, key, value, **arguments)), atol=0.05
    )


def test_merge_joins_two_halves_of_the_keys() -> None:
    rng = np.random.default_rng(0)
    logits, values = rng.standard_normal((3, 10)), rng.standard_normal((10, 4))

    def attention_over(part: slice) -> Partial:
        weights = np.exp(logits[:, part])
        total = weights.sum(axis=1)
        return Partial(jnp.asarray(weights / total[:, None] @ values[part]), jnp.asarray(np.log(total)))

    merged = merge(attention_over(slice(0, 4)), attention_over(slice(4, 10)))
    whole = attention_over(slice(0, 10))
    np.testing.assert_allclose(merged.output, whole.output, rtol=1e-5)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-5)


@pytest.mark.parametrize("config", [Exact(), TwoStage(budget=1024)])
def test_attend_is_exact_where_the_budget_covers_every_key(config) -> None:
    query, key, value = random_inputs(2, 1, 4, 2, 40, 40, 16)
    rows: dict[str, Any] = {"offset": np.zeros(1, np.int32), "lengths": np.full(1, 40, np.int32)}
    output = attend(config, *map(jnp.asarray, (query, key, value)), **{k: jnp.asarray(v) for k, v in rows.items()})
    np.testing.assert_allclose(output, naive_attention(query, key, value, causal=True, **rows), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0, expected a finite number above 0"),
        ({"softcap": -50.0}, "softcap is -50.0"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"softcap": math.inf}, "softcap is inf"),
        ({"scale": math.nan}, "scale is nan, expected a finite number"),
    ],
)
@pytest.mark.parametrize("attention", [exact_attention, partial(attend, TwoStage(budget=1024))])
def test_what_no_logit_can_be_scaled_or_capped_with_is_refused(attention, options, message) -> None:
    query, key, value = map(jnp.asarray, random_inputs(2, 1, 4, 2, 4, 4, 16))
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, offset=jnp.zeros(1, jnp.int32), lengths=jnp.full(1, 4), **options)
