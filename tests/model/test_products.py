"""Products of activations with weights against numpy in float64, in XLA and with every instruction set."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer import kernels
from iceformer.model.products import multiply_all, multiply_transposed

EXAMPLES = int(os.environ.get("ICEFORMER_EXAMPLES", "2"))
"""Of each case."""
# Rows: few, too few for tiles, some, more than a task. Depths around a pack of 256 and a part of 128 KB, columns around
# a panel of 64 and a task of 256 or 2048.
ROWS, DEPTHS = (1, 2, 3, 4, 5, 8, 9, 33, 530), (1, 7, 31, 256, 300, 513)
COLUMNS = (1, 15, 64, 100, 257, 700, 2100)
WEIGHTS = ("float32", "bfloat16", "int8")


@pytest.fixture(autouse=True, scope="module", params=["", *kernels.instruction_sets()])
def form(request: pytest.FixtureRequest) -> str:
    """The instruction set, or "" for XLA."""
    return request.param


def in_form(form: str, call: Callable[..., Any], *arrays: jax.Array) -> np.ndarray:
    def traced_for_this_form(*arrays: jax.Array) -> Any:
        return call(*arrays)

    with kernels.using(form) if form else kernels.disabled():
        return jax.tree.map(np.asarray, jax.jit(traced_for_this_form)(*arrays))


def activations(rng: np.random.Generator, rows: int, depth: int, dtype: str) -> jax.Array:
    """Of magnitudes of all kinds: a float that lost bits on the way would show."""
    return jnp.asarray(rng.standard_normal((rows, depth)) * 10.0 ** rng.integers(-3, 4, (1, depth)), dtype)


def check(result: np.ndarray, x: jax.Array, weights: np.ndarray) -> None:
    """A sum in float32: a rounding for each term, at worst."""
    wide = np.asarray(x, np.float64)
    bound = np.abs(wide) @ np.abs(weights) * (x.shape[1] + 4) * 2.0**-24
    assert result.dtype == np.float32
    assert (np.abs(result - wide @ weights) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    depth=st.sampled_from(DEPTHS),
    columns=st.sampled_from(COLUMNS),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_product_in_float64(
    form: str, dtype: str, rows: int, depth: int, columns: int, weights: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    if (dtype, weights) == ("bfloat16", "float32"):
        weights = "bfloat16"  # Weights are as wide as activations, at most.
    x = activations(rng, rows, depth, dtype)
    kernel = jnp.asarray(rng.integers(-127, 128, (depth, columns)), weights)
    scale = jnp.asarray(rng.random(columns) + 0.01, jnp.float32)
    result = in_form(form, lambda *arrays: multiply_all(arrays[0], [arrays[1]], [arrays[2]])[0], x, kernel, scale)
    check(result, x, np.asarray(kernel, np.float64) * np.asarray(scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("shape", [(1, 9), (70, 33), (1030, 576)])
def test_transposed_equals_a_product_in_float64(form: str, dtype: str, rows: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, table = activations(rng, rows, shape[1], dtype), jnp.asarray(rng.standard_normal(shape), "bfloat16")
    tables = [table, table.astype(dtype)] if dtype == "float32" else [table]
    for each in tables:
        check(in_form(form, multiply_transposed, x, each), x, np.asarray(each, np.float64).T)


@pytest.mark.parametrize("rows", [1, 6])
def test_several_products_of_one_input_equal_each_alone(form: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 300, "float32")
    kernels_ = [jnp.asarray(rng.integers(-127, 128, (300, columns)), jnp.int8) for columns in (64, 700, 5)]
    scales = [jnp.asarray(rng.random(kernel.shape[1]), jnp.float32) for kernel in kernels_]
    together: Any = in_form(form, lambda x, *arrays: multiply_all(x, arrays[:3], arrays[3:]), x, *kernels_, *scales)
    for product, kernel, scale in zip(together, kernels_, scales, strict=True):
        alone = in_form(form, lambda *arrays: multiply_all(arrays[0], [arrays[1]], [arrays[2]])[0], x, kernel, scale)
        np.testing.assert_array_equal(product, alone)


def test_empty_arrays(form: str) -> None:
    def multiply(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> np.ndarray:
        return in_form(form, lambda *arrays: multiply_all(arrays[0], [arrays[1]], [arrays[2]])[0], x, kernel, scale)

    assert multiply(jnp.ones((0, 8)), jnp.ones((8, 5), jnp.int8), jnp.ones(5)).shape == (0, 5)
    for rows in (2, 20):
        sums = multiply(jnp.ones((rows, 0)), jnp.ones((0, 5), jnp.int8), jnp.ones(5))
        np.testing.assert_array_equal(sums, np.zeros((rows, 5)))


def test_shapes_that_do_not_fit_are_refused(form: str) -> None:
    if not form:
        pytest.skip("XLA refuses them itself")
    for x, kernel, scale in [((2, 8), (7, 5), 5), ((2, 8), (8, 5), 4)]:
        call = jax.ffi.ffi_call(kernels.LINEAR, [jax.ShapeDtypeStruct((2, 5), jnp.float32)])
        with pytest.raises(jax.errors.JaxRuntimeError, match="expected input"):
            call(jnp.ones(x), jnp.ones(kernel, jnp.int8), jnp.ones(scale), transposed=False)[0].block_until_ready()
    call = jax.ffi.ffi_call(kernels.LINEAR, [jax.ShapeDtypeStruct((2, 5), jnp.float32)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected float32 or bfloat16"):
        call(jnp.ones((2, 8), jnp.float16), jnp.ones((8, 5), jnp.int8), jnp.ones(5), transposed=False)[
            0
        ].block_until_ready()
