"""int4: the rounding of kernels, alone and for a layer's inputs."""

import ml_dtypes
import numpy as np
import pytest

from iceformer.model.int4 import (
    INT4_GROUP,
    group_size,
    inverse_factor,
    quantize_for_inputs,
    quantize_int4,
    shrunk_towards,
)

from ..few import few

FEATURES, OUTPUTS = 96, 7


def random_kernel(features: int = FEATURES, outputs: int = OUTPUTS) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((features, outputs)).astype(np.float32)


def moments(features: int = FEATURES, tokens: int = 400) -> np.ndarray:
    """Of inputs that depend on each other and differ in size."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((tokens, features // 4)) @ rng.standard_normal((features // 4, features))
    inputs = (mixed + 0.3 * rng.standard_normal((tokens, features))) * rng.uniform(0.1, 3, features)
    return (inputs.T @ inputs).astype(np.float32)


def weights_of(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float64) * np.repeat(scales.astype(np.float64), len(numbers) // len(scales), axis=0)


@pytest.mark.parametrize(
    ("features", "size"), [(64, 32), (576, 32), (48, 24), (80, 16), (40, 8), (50, 50), (8, 8), (7, 7), (33, 33)]
)
def test_groups_divide_the_inputs(features: int, size: int) -> None:
    assert group_size(features) == size
    numbers, scales = quantize_int4(random_kernel(features))
    assert scales.shape == (features // size, OUTPUTS)
    assert (numbers.dtype, scales.dtype) == (np.int8, ml_dtypes.bfloat16)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_every_weight_is_within_half_a_step_or_at_the_end_of_the_range(size: float) -> None:
    kernel = random_kernel() * np.float32(size)
    numbers, scales = quantize_int4(kernel)
    assert numbers.min() == -8
    assert numbers.max() == 7
    steps = np.repeat(np.abs(scales.astype(np.float64)), INT4_GROUP, axis=0)
    error = np.abs(kernel - weights_of(numbers, scales))
    inside = (numbers > -8) & (numbers < 7)
    assert (error[inside] <= steps[inside] * (0.5 + 1e-5)).all()
    # Weights beyond the range are few and near.
    assert (error <= steps * 1.6).all()
    # About what steps of a ninth of the largest of 32 normal numbers leave.
    assert np.square(error / size).mean() < 0.009


def test_zeros_and_what_is_nearly_zero_are_zeros() -> None:
    kernel = np.zeros((64, 3), np.float32)
    kernel[32:, 1] = 1e-38
    kernel[32:, 2] = 1
    numbers, scales = quantize_int4(kernel)
    assert np.isfinite(scales.astype(np.float32)).all()
    assert not weights_of(numbers, scales)[:, :2].any()
    np.testing.assert_allclose(weights_of(numbers, scales)[32:, 2], 1, rtol=2**-8)


def one_after_the_other(kernel: np.ndarray, second: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """GPTQ's equations 2 and 3 as they stand, with an inverse for every input: what is left over the inputs behind."""
    rest = kernel.astype(np.float64)
    numbers = np.empty(kernel.shape, np.int8)
    size = len(kernel) // len(scales)
    for at in range(len(kernel)):
        inverse = np.linalg.inv(second[at:, at:])
        scale = scales[at // size].astype(np.float64)
        numbers[at] = np.clip(np.rint(rest[at] / scale), -8, 7)
        error = (rest[at] - numbers[at] * scale) / inverse[0, 0]
        rest[at:] -= np.outer(inverse[:, 0], error)
    return numbers


@pytest.mark.parametrize("features", few([96, 288, 50], [50, 96]))
def test_rounding_for_inputs_is_that_of_the_paper(features: int) -> None:
    kernel, second = random_kernel(features), moments(features)
    numbers, scales = quantize_for_inputs(kernel, inverse_factor(second))
    damped = second.astype(np.float64) + np.eye(features) * 0.01 * np.mean(np.diagonal(second))
    np.testing.assert_array_equal(numbers, one_after_the_other(kernel, damped, scales))


def test_rounding_for_inputs_leaves_less_error_in_the_outputs() -> None:
    kernel, second = random_kernel(256, 20), moments(256)

    def loss(numbers: np.ndarray, scales: np.ndarray) -> float:
        error = kernel - weights_of(numbers, scales)
        return float(np.einsum("io,ij,jo->", error, second, error))

    assert loss(*quantize_for_inputs(kernel, inverse_factor(second))) < 0.4 * loss(*quantize_int4(kernel))


def test_inputs_that_do_not_depend_on_each_other_change_no_weight() -> None:
    """There is nothing to make up for: each is rounded to its nearest."""
    kernel = random_kernel()
    numbers, scales = quantize_for_inputs(kernel, inverse_factor(np.eye(FEATURES, dtype=np.float32)))
    expected, its_scales = quantize_int4(kernel)
    np.testing.assert_array_equal(scales, its_scales)
    np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("tokens", [0, 1, 10, 500])
def test_factor_is_that_of_the_inverse(tokens: int) -> None:
    second = moments(tokens=tokens)
    factor = inverse_factor(second)
    damped = second.astype(np.float64) + np.eye(FEATURES) * 0.01 * (np.mean(np.diagonal(second)) or 1.0)
    np.testing.assert_array_equal(factor, np.triu(factor))
    # Of the identity, as both are ill-conditioned.
    np.testing.assert_allclose(factor @ damped @ factor.T, np.eye(FEATURES), atol=2e-2)


def test_moments_of_a_few_inputs_are_mixed_with_common_ones() -> None:
    own, common = moments(tokens=50), moments(tokens=500) / 500
    np.testing.assert_array_equal(shrunk_towards(common, np.zeros_like(own), 0), common)
    # As many as twice the features: half of each.
    mixed = shrunk_towards(common, own, 2 * FEATURES)
    np.testing.assert_allclose(mixed, (own / (2 * FEATURES) + common) / 2, atol=1e-5)
    many = shrunk_towards(common, own * 10**6, 50 * 10**6)
    np.testing.assert_allclose(many, own / 50, atol=1e-4 * float(np.abs(own).max()))
