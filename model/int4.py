"""int4 kernels: numbers from -8 to 7 with a bfloat16 scale for a group of inputs of each output, and their rounding.

`quantize_int4` rounds each weight to its nearest. `quantize_for_inputs` lets the weights that come later make up for
the error of those before, as the layer's inputs weigh it.
Source: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, arXiv 2210.17323): algorithm 1, which follows from its equations 2 and 3.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import BFloat16, Float32, Int8

INT4_GROUP = 32
"""Inputs of a linear layer that share a scale, where there are whole groups of them; else fewer, or all."""
_UNIT = 8
"""What the size of a group is a multiple of, unless all inputs are one."""
_LEAST, _LARGEST = -8, 7
_DAMPING = 0.01
"""What is added to the diagonal of the second moments, as a share of its mean."""
_BLOCK = 64
"""Inputs whose errors are handed to all later ones together."""
_STEPS = (-10.0, -9.4, -8.8, -8.3, -7.8, -7.2, 6.8, 7.4, 8.2)
"""What the largest weight of a group may be in steps of its scale: beyond the range it is cut off."""

Rounded = tuple[Int8[np.ndarray, "in_features out_features"], BFloat16[np.ndarray, "groups out_features"]]
"""Numbers and their scales."""


def group_size(in_features: int, group: int = INT4_GROUP) -> int:
    """Inputs that share a scale: `group`, or the largest multiple of 8 below it that divides them, or all of them."""
    return next((size for size in range(group, 0, -_UNIT) if in_features % size == 0), in_features)


def quantize_int4(kernel: Float32[np.ndarray, "in_features out_features"], group: int = INT4_GROUP) -> Rounded:
    """Each weight rounded to its nearest, with scales that leave the smallest sum of squared errors."""
    features, outputs = kernel.shape
    size = group_size(features, group)
    even = np.ones(size, np.float32)
    numbers, scales = np.empty(kernel.shape, np.int8), _empty_scales(features // size, outputs)
    for index, start in enumerate(range(0, features, size)):
        some = kernel[start : start + size]
        scales[index] = _best_scale(some, even)
        numbers[start : start + size] = _nearest(some, scales[index].astype(np.float32))
    return numbers, scales


def quantize_for_inputs(
    kernel: Float32[np.ndarray, "in_features out_features"],
    factor: Float32[np.ndarray, "in_features in_features"],
    group: int = INT4_GROUP,
) -> Rounded:
    """Rounds the weights of one input after the other; the error goes to the inputs behind it, as far as they can
    replace it. The scales of a group are chosen when its turn comes.

    Args:
        kernel: the weights.
        factor: of the inputs' second moments, from `inverse_factor`.
        group: inputs that share a scale, as `group_size` has it.
    """
    features, outputs = kernel.shape
    size = group_size(features, group)
    block = max(_BLOCK // size, 1) * size
    rest = kernel.copy()
    numbers, scales = np.empty(kernel.shape, np.int8), _empty_scales(features // size, outputs)
    scale = np.empty(outputs, np.float32)
    for start in range(0, features, block):
        end = min(start + block, features)
        errors = np.empty((end - start, outputs), np.float32)
        for at in range(start, end):
            if at % size == 0:
                # An error counts as much as is left of it after the inputs behind made up for it.
                importance = np.diagonal(factor)[at : at + size] ** -2
                scales[at // size] = _best_scale(rest[at : at + size], importance)
                scale = scales[at // size].astype(np.float32)
            numbers[at] = _nearest(rest[at], scale)
            errors[at - start] = (rest[at] - numbers[at] * scale) / factor[at, at]
            rest[at + 1 : end] -= factor[at, at + 1 : end, None] * errors[at - start]
        rest[end:] -= factor[start:end, end:].T @ errors
    return numbers, scales


def shrunk(
    moments: Float32[np.ndarray, "in_features in_features"], count: int
) -> Float32[np.ndarray, "in_features in_features"]:
    """Second moments that `count` inputs are enough for: what is off the diagonal, smaller by the share 2 d / (2 d + n)
    for n inputs of d features.

    Without it, a few thousand inputs make up for errors as only they need it, so that others lose. Estimates of
    covariances are shrunk like this (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004); with this share, layers of SmolLM2 did about best after 2500, 8192 and 16384 tokens.
    """
    kept = moments * np.float32(1 - _share(moments, count))
    np.fill_diagonal(kept, np.diagonal(moments))
    return kept


def shrunk_towards(
    common: Float32[np.ndarray, "in_features in_features"],
    moments: Float32[np.ndarray, "in_features in_features"],
    count: int,
) -> Float32[np.ndarray, "in_features in_features"]:
    """The mean of x x^T over `count` inputs, from their second moments, mixed with that over a larger set of inputs by
    the share of `shrunk`: an expert's inputs, and those of all experts. Without inputs it is that of the larger set."""
    share = np.float32(_share(moments, count))
    return moments * ((1 - share) / np.float32(max(count, 1))) + common * share


def _share(moments: Float32[np.ndarray, "in_features in_features"], count: int) -> float:
    return 2 * len(moments) / (2 * len(moments) + count)


def inverse_factor(
    moments: Float32[np.ndarray, "in_features in_features"],
) -> Float32[np.ndarray, "in_features in_features"]:
    """The upper triangle U with U^T U the inverse of `moments`, the sum of x x^T over inputs.

    Their diagonal is raised by a hundredth of its mean, or by as much more as it takes.
    """
    features = len(moments)
    mean = float(np.mean(np.diagonal(moments))) or 1.0
    damping = _DAMPING
    while True:
        damped = moments + np.eye(features, dtype=np.float32) * np.float32(damping * mean)
        # H = R R^T with R an upper triangle: then U = R^-1.
        lower = jnp.linalg.cholesky(damped[::-1, ::-1])
        if bool(jnp.isfinite(lower).all()):
            break
        damping *= 10
    return np.asarray(solve_triangular(lower[::-1, ::-1], jnp.eye(features, dtype=jnp.float32)))


def _best_scale(
    weights: Float32[np.ndarray, "size out_features"], importance: Float32[np.ndarray, " size"]
) -> BFloat16[np.ndarray, " out_features"]:
    """Each output's scale with the smallest sum of squared errors, weighted by the inputs' importance, of those that
    make the largest weight one of `_STEPS`, and what least squares make of the best; 1 for a group of zeros."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)[0]
    # What is smaller would have a denormal scale, which is 0 where the product is computed.
    blank = np.abs(largest) < 64 * np.finfo(np.float32).tiny
    size = np.where(blank, 1, np.abs(largest)).astype(np.float32)
    weights = weights / size
    best, least = np.ones_like(size), np.full(size.shape, np.inf, np.float32)

    def consider(scale: Float32[np.ndarray, " out_features"]) -> None:
        scale = (scale * size).astype(ml_dtypes.bfloat16).astype(np.float32) / size
        error = weights / scale
        np.clip(np.rint(error, out=error), _LEAST, _LARGEST, out=error)
        error *= scale
        error -= weights
        error = importance @ np.square(error, out=error)
        better = ~blank & (error < least)
        best[better], least[better] = scale[better], error[better]

    for steps in _STEPS:
        consider(np.where(blank, 1, np.sign(largest)).astype(np.float32) / np.float32(steps))
    numbers = _nearest(weights, best).astype(np.float32)
    squares = importance @ np.square(numbers)
    consider(np.where(squares > 0, importance @ (weights * numbers), best) / np.where(squares > 0, squares, 1))
    return (best * size).astype(ml_dtypes.bfloat16)


def _nearest(
    weights: Float32[np.ndarray, "..."], scale: Float32[np.ndarray, " out_features"]
) -> Int8[np.ndarray, "..."]:
    return np.clip(np.rint(weights / scale), _LEAST, _LARGEST).astype(np.int8)


def _empty_scales(groups: int, outputs: int) -> BFloat16[np.ndarray, "groups out_features"]:
    return np.empty((groups, outputs), ml_dtypes.bfloat16)
