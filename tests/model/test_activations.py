"""Rounded activations: the rounding, and products of them with int8 weights against numpy, in XLA and with every
instruction set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from iceformer import kernels
from iceformer.model.activations import CHUNK, LEVELS, round_activations
from iceformer.model.products import FEW_ROWS, multiply_all

from ..few import few
from .test_products import EXAMPLES, activations, check, in_form, packed, product_of, scaled

# Rows around a register tile of 6, a task of 256 and what is rounded together, 64. Depths and groups around a chunk of
# 256; columns around a panel of 16 and a task of 64.
ROWS = (5, 6, 13, 70, 260)
DEPTHS = ((1, 1), (7, 1), (31, 1), (256, 4), (300, 1), (513, 1), (576, 9), (576, 2), (80, 10))
COLUMNS = (1, 15, 16, 64, 100, 257)
FORMATS = ("int8", "int16")


@pytest.fixture(autouse=True, scope="module", params=["", *kernels.instruction_sets()])
def form(request: pytest.FixtureRequest) -> str:
    """The instruction set, or "" for XLA."""
    return request.param


def rounded(x: jax.Array, groups: int, levels: int) -> np.ndarray:
    """The activations as they are multiplied, chunk by chunk."""
    wide = np.asarray(x, np.float32)
    result = np.zeros(wide.shape)
    group = wide.shape[1] // groups
    for row, first in np.ndindex(len(wide), groups):
        for start in range(first * group, (first + 1) * group, CHUNK):
            chunk = slice(start, min(start + CHUNK, (first + 1) * group))
            largest = np.abs(wide[row, chunk]).max()
            if largest > 0:
                integers = np.rint(wide[row, chunk] * (np.float32(levels) / largest))
                result[row, chunk] = integers.astype(np.float64) * largest / levels
    return result


def weights_of(rng: np.random.Generator, features: int, groups: int, columns: int) -> tuple[jax.Array, jax.Array]:
    kernel = jnp.asarray(rng.integers(-127, 128, (features, columns)), jnp.int8)
    return kernel, jnp.asarray(rng.random((groups, columns)) + 0.01, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", few(ROWS, (6, 260)))
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    depth=st.sampled_from(DEPTHS),
    columns=st.sampled_from(COLUMNS),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_product_of_rounded_rows(
    form: str, dtype: str, rows: int, depth: tuple[int, int], columns: int, format: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features, groups = depth
    x = activations(rng, rows, features, dtype)
    kernel, scale = weights_of(rng, features, groups, columns)
    product = product_of(form, x, kernel, scale, LEVELS[format])
    check(product, rounded(x, groups, LEVELS[format]), scaled(kernel, scale))


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_integers_of_all(form: str, format: str) -> None:
    """A sum of 256 products that are as large as they get, of either sign."""
    x = jnp.tile(jnp.asarray([3.0, -3.0])[:, None], (3, 512))
    kernel = jnp.full((512, 20), 127, jnp.int8).at[:, ::2].set(-127)
    scale = jnp.ones((1, 20))
    product = product_of(form, x, kernel, scale, LEVELS[format])
    check(product, rounded(x, 1, LEVELS[format]), scaled(kernel, scale))


@pytest.mark.parametrize("rows", [1, FEW_ROWS])
def test_a_few_rows_stay_as_they_are(form: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, rows, 128, "float32")
    kernel, scale = weights_of(rng, 128, 2, 40)
    check(product_of(form, x, kernel, scale, 127), np.asarray(x), scaled(kernel, scale))


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_zeros_and_numbers_of_every_size(form: str, factor: float) -> None:
    rng = np.random.default_rng(0)
    # A row of zeros, a chunk of zeros, one input that is a million times the others.
    x = activations(rng, 8, 320, "float32").at[2].set(0).at[:, 64:128].set(0).at[:, 5].mul(1e6) * factor
    kernel, scale = weights_of(rng, 320, 5, 33)
    product = product_of(form, x, kernel, scale, 127)
    check(product, rounded(x, 5, 127), scaled(kernel, scale))
    np.testing.assert_array_equal(product[2], np.zeros(33))


def test_numbers_with_a_denormal_scale_are_zeros(form: str) -> None:
    x, (kernel, scale) = jnp.full((6, 64), 1e-37), weights_of(np.random.default_rng(0), 64, 1, 20)
    np.testing.assert_array_equal(product_of(form, x, kernel, scale, 127), np.zeros((6, 20)))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(form: str, broken: float) -> None:
    x = jnp.ones((9, 128)).at[1, 70].set(broken)
    product = product_of(form, x, jnp.ones((128, 20), jnp.int8), jnp.ones((2, 20)), 127)
    assert np.isfinite(product).all(axis=1).tolist() == [True, False, *[True] * 7]
    assert not np.isfinite(product[1]).any()


def test_several_products_of_one_input_equal_each_alone(form: str) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, 70, 320, "float32")
    # Groups of two sizes, and a kernel that takes the rows as they are.
    kernels_ = [weights_of(rng, 320, groups, columns) for groups, columns in ((5, 64), (1, 100), (5, 5))]
    floats = jnp.asarray(rng.standard_normal((320, 33)), jnp.bfloat16)
    weights, scales = (
        [*(packed(kernel, scale) for kernel, scale in kernels_), floats],
        [*(scale for _, scale in kernels_), None],
    )
    together: Any = in_form(
        form, lambda x, *arrays: multiply_all(x, arrays[:4], [*arrays[4:], None], 127), x, *weights, *scales[:3]
    )
    for product, (kernel, scale) in zip(together, kernels_, strict=False):
        np.testing.assert_array_equal(product, product_of(form, x, kernel, scale, 127))
    check(together[3], x, np.asarray(floats, np.float64))


def test_empty_arrays(form: str) -> None:
    scale = jnp.ones((1, 5))
    assert product_of(form, jnp.ones((0, 8)), jnp.ones((8, 5), jnp.int8), scale, 127).shape == (0, 5)
    product = product_of(form, jnp.ones((20, 0)), jnp.ones((0, 5), jnp.int8), scale, 127)
    np.testing.assert_array_equal(product, np.zeros((20, 5)))


@settings(max_examples=50, deadline=None)
@given(
    x=arrays.arrays(np.float32, (3, 12), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    groups=st.sampled_from((1, 3)),
    format=st.sampled_from(FORMATS),
)
def test_every_activation_is_within_half_a_step_of_its_chunk(x: np.ndarray, groups: int, format: str) -> None:
    result = np.asarray(round_activations(jnp.asarray(x), groups, LEVELS[format]), np.float64)
    step = np.abs(x).reshape(3, groups, -1).max(axis=-1) / LEVELS[format]
    bound = np.repeat(step, 12 // groups, axis=1) * (0.5 + 1e-5 * LEVELS[format] / 127) + 1e-32
    assert (np.abs(result - x) <= bound).all()
