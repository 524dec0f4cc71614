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
from iceformer.model.panels import pack, unpack
from iceformer.model.products import multiply_all, multiply_transposed

EXAMPLES = int(os.environ.get("ICEFORMER_EXAMPLES", "2"))
"""Of each case."""
# Rows: few, too few for tiles, some, more than a task. Depths around a pack of 256 and a part of 128 KB, and the groups
# that have scales of their own; columns around a panel of 64 and a task of 256 or 2048.
ROWS = (1, 2, 3, 4, 5, 8, 9, 33, 530)
DEPTHS = ((1, 1), (7, 1), (31, 1), (256, 4), (300, 1), (513, 1), (576, 9), (576, 2))
COLUMNS = (1, 15, 64, 100, 257, 700, 2100)
WEIGHTS = ("float32", "bfloat16", "int8")


@pytest.fixture(autouse=True, scope="module", params=["", *kernels.instruction_sets()])
def form(request: pytest.FixtureRequest) -> str:
    """The instruction set, or "" for XLA."""
    return request.param


def in_form(form: str, call: Callable[..., Any], *arrays: jax.Array | None) -> np.ndarray:
    def traced_for_this_form(*arrays: jax.Array | None) -> Any:
        return call(*arrays)

    with kernels.using(form) if form else kernels.disabled():
        return jax.tree.map(np.asarray, jax.jit(traced_for_this_form)(*arrays))


def activations(rng: np.random.Generator, rows: int, depth: int, dtype: str) -> jax.Array:
    """Of magnitudes of all kinds: a float that lost bits on the way would show."""
    return jnp.asarray(rng.standard_normal((rows, depth)) * 10.0 ** rng.integers(-3, 4, (1, depth)), dtype)


def check(result: np.ndarray, x: jax.Array | np.ndarray, weights: np.ndarray) -> None:
    """A sum in float32: a rounding for each term, at worst."""
    wide = np.asarray(x, np.float64)
    bound = np.abs(wide) @ np.abs(weights) * (x.shape[1] + 4) * 2.0**-24
    assert result.dtype == np.float32
    assert (np.abs(result - wide @ weights) <= bound).all()


def packed(kernel: jax.Array) -> jax.Array:
    """The kernel as the product takes it."""
    return jnp.asarray(pack(np.asarray(kernel))) if kernel.dtype == jnp.int8 else kernel


def product_of(form: str, x: jax.Array, kernel: jax.Array, scale: jax.Array | None) -> np.ndarray:
    kernel = packed(kernel)
    return in_form(form, lambda *arrays: multiply_all(arrays[0], [arrays[1]], [arrays[2]])[0], x, kernel, scale)


def scaled(kernel: jax.Array, scale: jax.Array | None) -> np.ndarray:
    wide = np.asarray(kernel, np.float64)
    if scale is None:
        return wide
    return wide * np.repeat(np.asarray(scale), kernel.shape[0] // scale.shape[0], axis=0)


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
    form: str, dtype: str, rows: int, depth: tuple[int, int], columns: int, weights: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    if (dtype, weights) == ("bfloat16", "float32"):
        weights = "bfloat16"  # Weights are as wide as activations, at most.
    features, groups = depth
    x = activations(rng, rows, features, dtype)
    kernel = jnp.asarray(rng.integers(-127, 128, (features, columns)), weights)
    scale = jnp.asarray(rng.random((groups, columns)) + 0.01, jnp.float32) if weights == "int8" else None
    check(product_of(form, x, kernel, scale), x, scaled(kernel, scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("shape", [(1, 9), (70, 33), (1030, 576)])
def test_transposed_equals_a_product_in_float64(form: str, dtype: str, rows: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, table = activations(rng, rows, shape[1], dtype), jnp.asarray(rng.standard_normal(shape), "bfloat16")
    tables = [table, table.astype(dtype)] if dtype == "float32" else [table]
    for each in tables:
        check(in_form(form, multiply_transposed, x, each), x, np.asarray(each, np.float64).T)


@pytest.mark.parametrize("shape", [(1, 1), (4, 16), (7, 33), (66, 100)])
def test_panels_hold_the_kernel(shape: tuple[int, int]) -> None:
    kernel = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    panels = pack(kernel)
    for i, k in [(0, 0), (shape[1] - 1, shape[0] - 1), (shape[1] // 2, shape[0] // 3)]:
        assert panels[i // 16, k // 4, i % 16, k % 4] == kernel[k, i]
    np.testing.assert_array_equal(unpack(jnp.asarray(panels), shape[0])[:, : shape[1]], kernel)
    assert np.abs(panels.astype(int)).sum() == np.abs(kernel.astype(int)).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_numbers_of_every_size_and_zeros(form: str, dtype: str, rows: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 320, dtype) * jnp.asarray(scale, dtype)
    x = x.at[:, 64:128].set(0)
    kernel = jnp.asarray(rng.integers(-127, 128, (320, 33)), jnp.int8)
    scales = jnp.asarray(rng.random((5, 33)) + 0.01, jnp.float32)
    check(product_of(form, x, kernel, scales), x, scaled(kernel, scales))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(form: str, broken: float) -> None:
    x = jnp.ones((3, 128)).at[1, 70].set(broken)
    product = product_of(form, x, jnp.ones((128, 20), jnp.int8), jnp.ones((2, 20)))
    assert np.isfinite(product).all(axis=1).tolist() == [True, False, True]
    assert not np.isfinite(product[1]).any()


@pytest.mark.parametrize("rows", [1, 6])
def test_several_products_of_one_input_equal_each_alone(form: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 320, "float32")
    # One in a dtype of its own, without a scale.
    dtypes = {64: jnp.int8, 700: jnp.bfloat16, 5: jnp.int8}
    kernels_ = [jnp.asarray(rng.integers(-127, 128, (320, columns)), dtype) for columns, dtype in dtypes.items()]
    scales = [jnp.asarray(rng.random((5, 64)), jnp.float32), None, jnp.asarray(rng.random((5, 5)), jnp.float32)]
    together: Any = in_form(
        form, lambda x, *arrays: multiply_all(x, arrays[:3], arrays[3:]), x, *map(packed, kernels_), *scales
    )
    for product, kernel, scale in zip(together, kernels_, scales, strict=True):
        np.testing.assert_array_equal(product, product_of(form, x, kernel, scale))
        check(product, x, scaled(kernel, scale))


def test_empty_arrays(form: str) -> None:
    scale = jnp.ones((1, 5))
    assert product_of(form, jnp.ones((0, 8)), jnp.ones((8, 5), jnp.int8), scale).shape == (0, 5)
    for rows in (2, 20):
        sums = product_of(form, jnp.ones((rows, 0)), jnp.ones((0, 5), jnp.int8), scale)
        np.testing.assert_array_equal(sums, np.zeros((rows, 5)))


def test_shapes_that_do_not_fit_are_refused(form: str) -> None:
    if not form:
        pytest.skip("XLA refuses them itself")

    def refused(x: jax.Array, kernel: jax.Array, *scales: jax.Array, transposed: bool = False, levels: int = 0) -> str:
        call = jax.ffi.ffi_call(kernels.LINEAR, [jax.ShapeDtypeStruct((2, 5), jnp.float32)])
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            call(x, kernel, *scales, transposed=transposed, levels=np.int64(levels))[0].block_until_ready()
        return str(caught.value)

    x, floats, scale = jnp.ones((2, 8)), jnp.ones((8, 5)), jnp.ones((1, 5))
    kernel = packed(floats.astype(jnp.int8))
    assert "expected kernel [in_features" in refused(x, floats[:7])
    assert "expected kernel [out_features / 16" in refused(x, kernel[:, :1], scale)
    assert "expected kernel [out_features / 16" in refused(x, floats.astype(jnp.int8), scale)
    assert "expected float32 or bfloat16" in refused(x.astype(jnp.float16), kernel, scale)
    assert "expected scales [groups" in refused(x, kernel, scale[:, :4])
    assert "expected scales [groups" in refused(x, kernel, jnp.ones((3, 5)))
    assert "a multiple of 8" in refused(x, kernel, jnp.ones((2, 5)))
    assert "and no others" in refused(x, kernel, scale, scale)
    assert "no int8" in refused(x, kernel, scale, transposed=True)
    assert "levels from 0" in refused(x, kernel, scale, levels=-1)
    assert "to 32767" in refused(x, kernel, scale, levels=32768)
