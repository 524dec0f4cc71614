"""The layout of int8 kernels in memory: what a few rows multiply at a time lies together, in the order of its use.

[panels, steps, 16, 4]: 16 outputs, then 4 inputs, which integer products sum over; zeros behind the last of both.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8

OUTPUTS, INPUTS = 16, 4
"""Outputs of a panel, and inputs of a step."""

Panels = Int8[Array, "_ _ 16 4"]


def pack(kernel: Int8[np.ndarray, "in_features out_features"]) -> Int8[np.ndarray, "panels steps 16 4"]:
    """The panels of a kernel."""
    features, outputs = kernel.shape
    padded = np.pad(kernel, ((0, -features % INPUTS), (0, -outputs % OUTPUTS)))
    split = padded.reshape(padded.shape[0] // INPUTS, INPUTS, padded.shape[1] // OUTPUTS, OUTPUTS)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def unpack(panels: Panels, features: int) -> Int8[Array, "in_features _"]:
    """The kernel of so many inputs, with the zeros behind its last output."""
    count, steps, outputs, inputs = panels.shape
    return jnp.transpose(panels, (1, 3, 0, 2)).reshape(steps * inputs, count * outputs)[:features]


def outputs(panels: Panels, numbers: Int[Array, "*shape"], features: int) -> Int8[Array, "*shape in_features"]:
    """The weights of some outputs, by number."""
    steps = panels[numbers // OUTPUTS, :, numbers % OUTPUTS]
    return steps.reshape(*numbers.shape, -1)[..., :features]
