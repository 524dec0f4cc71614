"""The native kernels against the XLA form, with every instruction set that this processor has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array

from iceformer import kernels
from iceformer.attention import LowRank, TwoStage, custom_calls, exact_attention, two_stage_attention

from .reference import random_inputs


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """Both forms are compared in each test of this module, so that it runs once."""


@dataclass(frozen=True)
class Case:
    """A call's shape and options; two batch rows."""

    heads: tuple[int, int] = (4, 2)
    queries: int = 96
    keys: int = 400
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    softcap: float | None = None
    two_stage: dict[str, Any] | None = field(default=None, hash=False)


SMALL: dict[str, Any] = {"budget": 96, "query_block": 16, "key_block": 8, "candidates": 1.5, "sink": 4, "local": 4}
HALF = {"method": LowRank(rank=30, query_share=0.5)}
CASES = {
    "exact": Case(),
    "exact, one query": Case(queries=1, heads=(3, 3)),
    "exact, odd sizes, softcap": Case(heads=(3, 1), queries=50, keys=333, head_dim=36, softcap=5.0),
    "exact, head size 256, bidirectional": Case(heads=(1, 1), queries=70, keys=200, head_dim=256, causal=False),
    "exact, bfloat16": Case(dtype="bfloat16", head_dim=32),
    "exact, bfloat16, odd sizes": Case(dtype="bfloat16", heads=(5, 1), queries=33, keys=131, head_dim=80, causal=False),
    "two-stage": Case(two_stage=SMALL),
    "two-stage, bidirectional": Case(two_stage=SMALL, causal=False, queries=400),
    "two-stage, odd sizes, softcap": Case(
        two_stage=SMALL | HALF, heads=(3, 1), queries=90, keys=333, head_dim=36, softcap=5.0
    ),
    "two-stage, small blocks, many directions": Case(
        two_stage=SMALL | {"key_block": 2, "crossover": 200, "method": LowRank(rank=70)}, head_dim=128
    ),
    "two-stage, large blocks": Case(two_stage=SMALL | HALF | {"key_block": 16, "candidates": 2.0, "local": 0}),
    "two-stage, bfloat16": Case(two_stage=SMALL, dtype="bfloat16"),
    "two-stage, bfloat16, bidirectional": Case(two_stage=SMALL, dtype="bfloat16", causal=False, head_dim=256),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@functools.cache
def attention(name: str) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """A case in XLA and with the kernels, as jitted functions of arrays, offsets and lengths."""
    case = CASES[name]
    options: dict[str, Any] = {"causal": case.causal, "softcap": case.softcap}

    def call(*arrays: Array, offset: Array, lengths: Array) -> Array:
        rows = {"offset": offset, "lengths": lengths}
        if case.two_stage is None:
            return exact_attention(*arrays[:3], **rows, **options)
        return two_stage_attention(TwoStage(**case.two_stage), *arrays[:3], basis=arrays[3], **rows, **options)

    def in_xla(*arrays: Array, offset: Array, lengths: Array) -> Array:
        with kernels.disabled():
            return call(*arrays, offset=offset, lengths=lengths)

    return jax.jit(in_xla), jax.jit(call)


def inputs(case: Case, seed: int, sharpness: float) -> tuple[Array, ...]:
    """Queries, keys, values and a basis that is calibrated to them; sharper softmaxes for larger `sharpness`."""
    query, key, value = random_inputs(seed, 2, *case.heads, case.queries, case.keys, case.head_dim)
    query *= sharpness
    method = (case.two_stage or {}).get("method", LowRank())
    tokens = min(case.queries, case.keys)
    basis = method.calibrate(query[0, :, :tokens], key[0, :, :tokens])
    return (*(jnp.asarray(x, case.dtype) for x in (query, key, value)), jnp.asarray(basis))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    sharpness=st.sampled_from([0.3, 1.0, 4.0]),
    lengths=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    at_end=st.booleans(),
)
def test_agrees_with_xla(name: str, seed: int, sharpness: float, lengths: tuple[int, int], at_end: bool) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    case = CASES[name]
    arrays = inputs(case, seed, sharpness)
    valid = np.minimum(np.array(lengths, np.int32), case.keys)
    offset = np.maximum(valid - case.queries, 0) if at_end else np.zeros(2, np.int32)
    rows = {"offset": jnp.asarray(offset, jnp.int32), "lengths": jnp.asarray(valid)}
    in_xla, native = attention(name)
    expected = np.asarray(in_xla(*arrays, **rows), np.float32)
    assert np.isfinite(expected).all()
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            output = np.asarray(native(*arrays, **rows), np.float32)
        assert np.isfinite(output).all()
        for row in range(2):
            # Under the causal mask queries from `lengths` on are padding: nobody promises their rows.
            count = np.clip(valid[row] - offset[row], 0, case.queries) if case.causal else case.queries
            np.testing.assert_allclose(
                output[row, :, :count], expected[row, :, :count], atol=TOLERANCE[case.dtype], err_msg=instruction_set
            )


def test_log_sum_exp_is_that_of_the_visible_logits() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    query, key, value = map(jnp.asarray, random_inputs(0, 2, 4, 2, 20, 50, 16))
    offset, lengths = jnp.array([30, 0], jnp.int32), jnp.array([50, 0], jnp.int32)
    _, lse = custom_calls.exact(
        query, key, value, offset=offset, lengths=lengths, causal=True, scale=0.25, softcap=None
    )
    logits = jnp.einsum("hqd,hkd->hqk", query[0], jnp.repeat(key[0], 2, axis=0)) * 0.25
    visible = jnp.arange(50)[None, :] <= 30 + jnp.arange(20)[:, None]
    expected = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(lse[0], expected, atol=1e-5)
    assert (lse[1] == np.finfo(np.float32).min).all(), "a query that sees no key"


def test_a_key_of_overwhelming_weight_that_is_not_selected_does_not_wipe_out_the_others() -> None:
    # One query gives nearly all its weight to keys that the budget has no room for beside those of the other queries.
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    name = "two-stage, bidirectional"
    case = CASES[name]
    query, key, value, basis = inputs(case, 5, 1.0)
    key = key * 60.0
    rows = {"offset": jnp.zeros(2, jnp.int32), "lengths": jnp.full(2, case.keys, jnp.int32)}
    in_xla, native = attention(name)
    expected = np.asarray(in_xla(query, key, value, basis, **rows))
    np.testing.assert_allclose(native(query, key, value, basis, **rows), expected, atol=1e-4)


def test_an_unknown_instruction_set_is_refused() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    with pytest.raises(ValueError, match="expected one of: "), kernels.using("abacus"):
        pass
