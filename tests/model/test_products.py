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
from iceformer.model.panels import pack, pack_int4, unpack
from iceformer.model.products import multiply_all, multiply_transposed

from ..few import few

EXAMPLES = int(os.environ.get("ICEFORMER_EXAMPLES", "2"))
"""Of each case."""
# Rows: few, too few for tiles, some, more than a task. Depths around a pack of 256 and a part of 128 KB, and the groups
# that have scales of their own; columns around a panel of 64 and a task of 256 or 2048.
ROWS = (1, 2, 3, 4, 5, 8, 9, 33, 530)
DEPTHS = ((1, 1), (7, 1), (31, 1), (72, 3), (256, 4), (300, 1), (513, 1), (576, 9), (576, 2))
COLUMNS = (1, 15, 64, 100, 257, 700, 2100)
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
RANGES = {"int4": (-8, 8)}
"""Of the integers that stand for weights; else those of int8."""


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


def packed(kernel: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The kernel as the product takes it: int4 have scales in bfloat16."""
    if kernel.dtype != jnp.int8:
        return kernel
    in_panels = pack_int4 if scale is not None and scale.dtype == jnp.bfloat16 else pack
    return jnp.asarray(in_panels(np.asarray(kernel)))


def product_of(form: str, x: jax.Array, kernel: jax.Array, scale: jax.Array | None, levels: int = 0) -> np.ndarray:
    kernel = packed(kernel, scale)
    return in_form(form, lambda *arrays: multiply_all(arrays[0], [arrays[1]], [arrays[2]], levels)[0], x, kernel, scale)


def integers(
    rng: np.random.Generator, weights: str, shape: tuple[int, int], groups: int
) -> tuple[jax.Array, jax.Array | None]:
    """A random kernel in a format, and its scales if it has any, of both signs with int4."""
    kernel = jnp.asarray(rng.integers(*RANGES.get(weights, (-127, 128)), shape), jnp.int8)
    scales = rng.random((groups, shape[1])) + 0.01
    if weights == "int4":
        return kernel, jnp.asarray(scales * rng.choice([-1, 1], scales.shape), jnp.bfloat16)
    return (kernel, jnp.asarray(scales, jnp.float32)) if weights == "int8" else (kernel.astype(weights), None)


def scaled(kernel: jax.Array, scale: jax.Array | None) -> np.ndarray:
    wide = np.asarray(kernel, np.float64)
    if scale is None:
        return wide
    return wide * np.repeat(np.asarray(scale, np.float64), kernel.shape[0] // scale.shape[0], axis=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", few(ROWS, (1, 4, 5, 33, 530)))
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
    kernel, scale = integers(rng, weights, (features, columns), groups)
    check(product_of(form, x, kernel, scale), x, scaled(kernel, scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", few([1, 3, 4, 5, 40], [1, 5, 40]))
@pytest.mark.parametrize("shape", [(1, 9), pytest.param((70, 33), marks=pytest.mark.slow), (1030, 576)])
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


@pytest.mark.parametrize("shape", [(1, 1), (8, 16), (13, 33), (66, 100)])
def test_panels_of_int4_hold_the_kernel(shape: tuple[int, int]) -> None:
    kernel = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    panels = pack_int4(kernel)
    assert panels.dtype == np.uint8
    for i, k in [(0, 0), (shape[1] - 1, shape[0] - 1), (shape[1] // 2, shape[0] // 3)]:
        byte = int(panels[i // 16, k // 4, i % 16, k % 2])
        number = byte >> 4 if k % 4 > 1 else byte & 15
        assert (number ^ 8) - 8 == kernel[k, i]
    np.testing.assert_array_equal(unpack(jnp.asarray(panels), shape[0])[:, : shape[1]], kernel)
    # Nothing but zeros stands behind the last output.
    assert not np.asarray(unpack(jnp.asarray(panels), shape[0]))[:, shape[1] :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", few([1, 3, 6], [3, 6]))
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("scale", few([1e-30, 1.0, 1e30], [1e-30, 1e30]))
def test_numbers_of_every_size_and_zeros(form: str, dtype: str, rows: int, weights: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 320, dtype) * jnp.asarray(scale, dtype)
    x = x.at[:, 64:128].set(0)
    kernel, scales = integers(rng, weights, (320, 33), 5)
    check(product_of(form, x, kernel, scales), x, scaled(kernel, scales))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_so_in_its_row_alone(form: str, scale: str, broken: float) -> None:
    x = jnp.ones((3, 128)).at[1, 70].set(broken)
    product = product_of(form, x, jnp.ones((128, 20), jnp.int8), jnp.ones((2, 20), scale))
    assert np.isfinite(product).all(axis=1).tolist() == [True, False, True]
    assert not np.isfinite(product[1]).any()


@pytest.mark.parametrize("rows", [1, 6])
def test_several_products_of_one_input_equal_each_alone(form: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 320, "float32")
    # One of them without a scale.
    formats = {64: "int8", 700: "bfloat16", 5: "int4"}
    kernels_, scales = zip(
        *(integers(rng, weights, (320, columns), 5) for columns, weights in formats.items()), strict=True
    )
    in_panels = map(packed, kernels_, scales)
    together: Any = in_form(form, lambda x, *arrays: multiply_all(x, arrays[:3], arrays[3:]), x, *in_panels, *scales)
    for product, kernel, scale in zip(together, kernels_, scales, strict=True):
        np.testing.assert_array_equal(product, product_of(form, x, kernel, scale))
        check(product, x, scaled(kernel, scale))


def test_empty_arrays(form: str) -> None:
    for scale in (jnp.ones((1, 5)), jnp.ones((1, 5), jnp.bfloat16)):
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
    kernel, pairs = (packed(floats.astype(jnp.int8), each) for each in (scale, scale.astype(jnp.bfloat16)))
    assert "expected kernel [in_features" in refused(x, floats[:7])
    assert "expected kernel [out_features / 16" in refused(x, kernel[:, :1], scale)
    assert "expected kernel [out_features / 16" in refused(x, floats.astype(jnp.int8), scale)
    assert "expected kernel [out_features / 16" in refused(x, kernel.view(jnp.uint8), scale)
    assert "bfloat16 with uint8" in refused(x, pairs, scale)
    assert "bfloat16 with uint8" in refused(x, kernel, scale.astype(jnp.bfloat16))
    assert "expected float32 or bfloat16" in refused(x.astype(jnp.float16), kernel, scale)
    assert "expected scales [groups" in refused(x, kernel, scale[:, :4])
    assert "expected scales [groups" in refused(x, kernel, jnp.ones((3, 5)))
    assert "a multiple of 8" in refused(x, kernel, jnp.ones((2, 5)))
    assert "and no others" in refused(x, kernel, scale, scale)
    assert "no int8" in refused(x, kernel, scale, transposed=True)
    assert "levels from 0" in refused(x, kernel, scale, levels=-1)
    assert "to 32767" in refused(x, kernel, scale, levels=32768)
    assert "levels of 0" in refused(x, pairs, scale.astype(jnp.bfloat16), levels=127)
    assert "no int8" in refused(x, pairs, scale, transposed=True)
