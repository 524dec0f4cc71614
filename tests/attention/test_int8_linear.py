"""The native product with an int8 kernel against numpy in float64, with every instruction set of this processor."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer import kernels
from iceformer.model.int8 import int8_matmul

EXAMPLES = int(os.environ.get("ICEFORMER_EXAMPLES", "2"))
"""Of each case."""
# Rows: few, too few for tiles, some, more than a task. Depths around a pack of 256, columns around a panel of 64 and a
# task of 256 or more.
ROWS, DEPTHS, COLUMNS = (1, 2, 3, 4, 5, 8, 9, 33, 530), (1, 7, 31, 256, 300, 513), (1, 15, 64, 100, 257, 700)


@pytest.fixture(autouse=True, scope="module", params=["", *kernels.instruction_sets()])
def form(request: pytest.FixtureRequest) -> str:
    """The instruction set, or "" for XLA."""
    return request.param


def multiply(form: str, x: jax.Array, kernel: jax.Array, scale: jax.Array) -> np.ndarray:
    def traced_for_this_form(*arrays: jax.Array) -> jax.Array:
        return int8_matmul(*arrays)

    with kernels.using(form) if form else kernels.disabled():
        return np.asarray(jax.jit(traced_for_this_form)(x, kernel, scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(depth=st.sampled_from(DEPTHS), columns=st.sampled_from(COLUMNS), seed=st.integers(0, 2**32 - 1))
def test_equals_a_product_in_float64(form: str, dtype: str, rows: int, depth: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Magnitudes of all kinds: a float that lost bits on the way would show.
    x = jnp.asarray(rng.standard_normal((rows, depth)) * 10.0 ** rng.integers(-3, 4, (1, depth)), dtype)
    kernel = rng.integers(-127, 128, (depth, columns)).astype(np.int8)
    scale = (rng.random(columns) + 0.01).astype(np.float32)
    wide, weights = np.asarray(x, np.float64), kernel.astype(np.float64) * scale
    result = multiply(form, x, jnp.asarray(kernel), jnp.asarray(scale))
    # Of a sum in float32: a rounding for each term, at worst.
    bound = np.abs(wide) @ np.abs(weights) * (depth + 4) * 2.0**-24
    assert result.dtype == np.float32
    assert (np.abs(result - wide @ weights) <= bound).all()


def test_empty_arrays(form: str) -> None:
    nothing = multiply(form, jnp.ones((0, 8)), jnp.ones((8, 5), jnp.int8), jnp.ones(5))
    assert nothing.shape == (0, 5)
    for rows in (2, 20):
        sums = multiply(form, jnp.ones((rows, 0)), jnp.ones((0, 5), jnp.int8), jnp.ones(5))
        np.testing.assert_array_equal(sums, np.zeros((rows, 5)))


def test_shapes_that_do_not_fit_are_refused(form: str) -> None:
    if not form:
        pytest.skip("XLA refuses them itself")
    for x, kernel, scale in [((2, 8), (7, 5), 5), ((2, 8), (8, 5), 4)]:
        call = jax.ffi.ffi_call(kernels.INT8_LINEAR, jax.ShapeDtypeStruct((2, 5), jnp.float32))
        with pytest.raises(jax.errors.JaxRuntimeError, match="expected input"):
            call(jnp.ones(x), jnp.ones(kernel, jnp.int8), jnp.ones(scale)).block_until_ready()
    call = jax.ffi.ffi_call(kernels.INT8_LINEAR, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected float32 or bfloat16"):
        call(jnp.ones((2, 8), jnp.float16), jnp.ones((8, 5), jnp.int8), jnp.ones(5)).block_until_ready()
