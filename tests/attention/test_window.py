"""Exact attention in a sliding window, against plain numpy and the masks of transformers, and what it costs."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer.attention import Exact, TwoStage
from iceformer.attention.blocks import Visibility

from ..few import few
from .calls import XLA_IS_SLOW, attend, exact_attention
from .reference import naive_attention, random_inputs

STATIC = ("causal", "softcap", "scale", "window")
run = jax.jit(partial(exact_attention, query_block=8, key_block=16), static_argnames=STATIC)
# Heads, sizes, window, causal, softcap and dtype: windows of one key; below, at and above the blocks of keys and of
# queries; above the length. Each is compiled once and has several examples.
CALLS = [
    ((4, 2), (90, 90), 1, True, None, "float32"),
    ((1, 1), (61, 200), 5, False, None, "float32"),
    ((4, 2), (61, 200), 16, True, 2.0, "float32"),
    ((1, 1), (13, 90), 33, False, 2.0, "float32"),
    ((4, 2), (1, 90), 70, True, None, "float32"),
    ((1, 1), (13, 90), 1000, True, None, "bfloat16"),
    ((4, 2), (61, 200), 33, False, None, "bfloat16"),
    ((4, 2), (90, 90), 5, True, 2.0, "bfloat16"),
]


@pytest.mark.parametrize(
    ("heads", "sizes", "window", "causal", "softcap", "dtype"), few(CALLS, [CALLS[2], CALLS[4], CALLS[6]])
)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 100),
    lengths=st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
def test_equals_numpy(seed, heads, sizes, offset, lengths, window, causal, softcap, dtype) -> None:
    arrays = random_inputs(seed, 2, heads[0], heads[1], sizes[0], sizes[1], 16)
    query, key, value = (x.astype(jnp.dtype(dtype)) for x in arrays)
    offsets, rows = np.array([offset, 0], np.int32), np.array(lengths, np.int32)
    options: dict[str, Any] = {"causal": causal, "softcap": softcap, "window": window, "scale": 0.3}
    output = run(query, key, value, offset=jnp.asarray(offsets), lengths=jnp.asarray(rows), **options)
    output = np.asarray(output, np.float32)
    expected = naive_attention(query, key, value, offset=offsets, lengths=rows, **options)
    assert np.isfinite(output).all()
    for row in range(2):
        valid = np.clip(min(rows[row], sizes[1]) - offsets[row], 0, sizes[0])
        atol = 3e-6 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(output[row, :, :valid], expected[row, :, :valid], atol=atol)


@pytest.mark.parametrize("causal", few([True, False], [True]))
def test_a_prompt_in_chunks_and_steps_equals_the_whole(causal) -> None:
    """Of a cache that is longer than what is filled, whose rest holds what an earlier prompt left there."""
    query, key, value = map(jnp.asarray, random_inputs(0, 1, 4, 2, 150, 400, 16))
    length, window = 150, 40
    options: dict[str, Any] = {"causal": causal, "window": window}

    def attend_from(start: int, count: int) -> np.ndarray:
        part = query[:, :, start : start + count]
        rows = {"offset": jnp.full(1, start, jnp.int32), "lengths": jnp.full(1, length, jnp.int32)}
        return np.asarray(run(part, key, value, **rows, **options))

    whole = naive_attention(
        *(np.asarray(x) for x in (query, key[:, :, :length], value[:, :, :length])),
        offset=np.zeros(1, np.int32),
        lengths=np.full(1, length),
        **options,
    )
    pieces = [attend_from(0, 64), attend_from(64, 64), *(attend_from(start, 1) for start in range(128, 150))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=2), whole, atol=3e-6)


@pytest.mark.parametrize(
    ("queries", "window", "causal", "dtype"),
    [
        (1, 100, True, "float32"),
        pytest.param(1, 100, False, "bfloat16", marks=pytest.mark.slow),
        pytest.param(64, 1, True, "bfloat16", marks=pytest.mark.slow),
        pytest.param(64, 1, False, "float32", marks=pytest.mark.slow),
        pytest.param(64, 300, True, "float32", marks=pytest.mark.slow),
        (64, 300, False, "bfloat16"),
        (160, 64, True, "bfloat16"),
        pytest.param(160, 64, False, "float32", marks=pytest.mark.slow),
    ],
)
def test_keys_far_from_the_window_are_not_read(dtype, causal, queries, window) -> None:
    # A value of NaN times a weight of 0 is NaN: whoever visits a masked key gives itself away.
    start, tile = 2000, 128
    query, key, value = random_inputs(0, 1, 4, 2, queries, 4096, 16)
    first = (start - window + 1) // tile * tile
    last = start + queries + (0 if causal else window - 1)
    near = np.arange(4096)[:, None]
    near = (near >= first) & (near < -(-last // tile) * tile)
    rows: dict[str, Any] = {"offset": np.full(1, start, np.int32), "lengths": np.full(1, 4096, np.int32)}
    options: dict[str, Any] = {"causal": causal, "window": window}
    poisoned = [jnp.asarray(x, dtype) for x in (query, np.where(near, key, np.nan), np.where(near, value, np.nan))]
    call = jax.jit(partial(exact_attention, key_block=tile, query_block=64, **options))
    output = call(*poisoned, **{name: jnp.asarray(x) for name, x in rows.items()})
    inputs = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (query, key, value))
    atol = 3e-6 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(np.asarray(output, np.float32), naive_attention(*inputs, **rows, **options), atol=atol)


@pytest.mark.parametrize(
    ("causal", "dtype"),
    few(
        itertools.product((True, False), ("float32", "bfloat16")),
        [(True, "bfloat16"), (False, "float32")],
    ),
)
def test_no_query_of_a_whole_prompt_reads_far_from_its_window(dtype, causal) -> None:
    tokens, window, tile = 1024, 64, 64
    query, key, value = (jnp.asarray(x, dtype) for x in random_inputs(0, 1, 4, 2, tokens, tokens, 16))
    bad = slice(448, 576)
    value = value.at[:, :, bad].set(np.nan)
    rows: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, tokens, jnp.int32)}
    call = jax.jit(partial(exact_attention, causal=causal, window=window, query_block=tile, key_block=tile))
    output = call(query, key, value, **rows)
    finite = np.asarray(jnp.isfinite(output).all(axis=(0, 1, 3)))
    # Beside the window, a query's own block and the tile in which the window ends may be in between.
    reach = window + 2 * tile
    assert finite[: bad.start - reach].all()
    assert finite[bad.stop + reach :].all()
    assert not finite[bad].any(), "a query reads its own key"


def test_a_row_whose_window_lies_behind_the_length_is_zero() -> None:
    query, key, value = map(jnp.asarray, random_inputs(0, 3, 2, 1, 8, 64, 16))
    rows = {"offset": jnp.array([40, 0, 60], jnp.int32), "lengths": jnp.array([20, 0, 64], jnp.int32)}
    for causal in (True, False):
        output = np.asarray(run(query, key, value, **rows, causal=causal, window=4))
        np.testing.assert_array_equal(output[:2], 0.0)
        assert np.isfinite(output).all()
        assert (output[2, :, :4] != 0).all()


@pytest.mark.parametrize("queries", [1, 7])
@given(
    window=st.sampled_from([None, 1, 2, 9, 100, 2**31 - 1]),
    causal=st.booleans(),
    first=st.integers(0, 60),
    length=st.integers(0, 40),
)
@settings(max_examples=25, deadline=None)
def test_start_and_end_enclose_the_visible_keys(queries, window, causal, first, length) -> None:
    visibility = Visibility(first + jnp.arange(queries), jnp.asarray(length), causal, window)
    seen = [
        j
        for j in range(length)
        for i in range(first, first + queries)
        if (not causal or j <= i) and (window is None or abs(i - j) < window)
    ]
    start, end = int(visibility.start()), int(visibility.end())
    if seen:
        assert (start, end) == (min(seen), max(seen) + 1)
    else:
        assert end <= start


def visible_keys(tokens: int, **options: Any) -> np.ndarray:
    """[tokens, tokens]: which keys each query sees, told by attention to equal keys with one value for each."""
    query = key = jnp.zeros((1, 1, tokens, 16))
    value = jnp.eye(tokens)[None, None]
    rows = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, tokens, jnp.int32)}
    return np.asarray(jax.jit(partial(exact_attention, **options))(query, key, value, **rows))[0, 0] > 0


@pytest.mark.parametrize("window", few([1, 7, 100], [7]))
def test_a_causal_window_is_the_sliding_window_of_mistral(window) -> None:
    import torch
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(sliding_window=window)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(config, torch.zeros(1, 40, 8), None, None)
    assert isinstance(mask, torch.Tensor)
    np.testing.assert_array_equal(visible_keys(40, causal=True, window=window), mask[0, 0].numpy() == 0)


@pytest.mark.parametrize("local_attention", few([2, 7, 16, 200], [16]))
def test_a_bidirectional_window_is_the_local_attention_of_modernbert(local_attention) -> None:
    import torch
    from transformers import ModernBertConfig
    from transformers.masking_utils import create_bidirectional_sliding_window_mask

    config = ModernBertConfig(local_attention=local_attention)
    config._attn_implementation = "eager"
    mask = create_bidirectional_sliding_window_mask(config, torch.zeros(1, 40, 8), None)
    # Transformers leaves out a mask that hides nothing.
    expected = np.full((40, 40), True) if mask is None else mask[0, 0].numpy() == 0
    np.testing.assert_array_equal(visible_keys(40, causal=False, window=local_attention // 2 + 1), expected)


@pytest.mark.parametrize("config", [Exact(), Exact(query_block=16, key_block=32), TwoStage(budget=64, key_block=1)])
def test_attend_is_exact_in_the_window_whatever_the_configuration(config) -> None:
    query, key, value = random_inputs(2, 1, 4, 2, 200, 200, 16)
    rows: dict[str, Any] = {"offset": np.zeros(1, np.int32), "lengths": np.full(1, 200, np.int32)}
    arrays = map(jnp.asarray, (query, key, value))
    output = attend(config, *arrays, **{name: jnp.asarray(x) for name, x in rows.items()}, window=90)
    expected = naive_attention(query, key, value, causal=True, window=90, **rows)
    np.testing.assert_allclose(output, expected, atol=3e-6)


@pytest.mark.parametrize("window", [0, -1, 2**31])
def test_a_window_that_is_none_is_refused(window) -> None:
    query, key, value = map(jnp.asarray, random_inputs(0, 1, 1, 1, 4, 4, 16))
    rows: dict[str, Any] = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, 4)}
    with pytest.raises(ValueError, match=f"window is {window}, expected 1 to"):
        exact_attention(query, key, value, **rows, window=window)


@XLA_IS_SLOW
def test_the_widest_window_sees_all() -> None:
    query, key, value = map(jnp.asarray, random_inputs(0, 1, 2, 1, 60, 60, 16))
    rows = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, 60, jnp.int32)}
    for causal in (True, False):
        options: dict[str, Any] = {"causal": causal, **rows}
        np.testing.assert_allclose(
            run(query, key, value, window=2**31 - 1, **options), run(query, key, value, **options), atol=1e-6
        )
