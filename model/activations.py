"""Rounded activations: integers with a scale for every chunk of a row, for products with int8 weights.

A chunk is what shares a scale in the weights, and at most 256 inputs: activations that are far larger than the others,
which most models have in a few inputs, take precision from those of their chunk alone.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

LEVELS = {"same": 0, "int8": 127, "int16": 32767}
"""The largest integer of each format, on either side of 0; 0 for activations that are not rounded."""
CHUNK = 256
"""Inputs of a chunk, at most."""


def round_activations(
    x: Float[Array, "rows in_features"], groups: int, levels: int
) -> Float32[Array, "rows in_features"]:
    """The activations as integers times their scales.

    The largest of a chunk becomes `levels`, on one side of 0. A chunk with NaN or an infinity is NaN. One of zeros, or
    of numbers whose scale would be denormal, is 0.

    Args:
        x: the activations.
        groups: of inputs that have a scale each in the weights.
        levels: the largest integer.
    """
    rows, features = x.shape
    group = features // groups
    size = max(min(group, CHUNK), 1)
    split = jnp.pad(x.astype(jnp.float32).reshape(rows, groups, group), ((0, 0), (0, 0), (0, -group % size)))
    chunks = split.reshape(rows, groups, split.shape[-1] // size, size)
    most = jnp.max(jnp.abs(chunks), axis=-1, keepdims=True)
    inverse = jnp.where(most < np.float32(levels) * np.finfo(np.float32).tiny, 0, np.float32(levels) / most)
    # As the kernel has it: to the bit, lest the two round to different integers.
    unit = jnp.where(jnp.isfinite(most), most * (np.float32(1) / np.float32(levels)), jnp.nan)
    rounded = jnp.rint(chunks * inverse) * unit
    return rounded.reshape(split.shape)[..., :group].reshape(x.shape)
