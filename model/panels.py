"""The layout of integer kernels in memory: what a few rows multiply at a time lies together, in the order of its use.

int8: [panels, steps, 16, 4]: 16 outputs, then 4 inputs, which integer products sum over; zeros behind the last of both.
int4: [panels, steps, 16, 2] of uint8: the same, inputs 2 and 3 of a step in the high bits of bytes whose low bits have
inputs 0 and 1.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int8, UInt8

OUTPUTS, INPUTS = 16, 4
"""Outputs of a panel, and inputs of a step."""

Panels = Int8[Array, "_ _ 16 4"] | UInt8[Array, "_ _ 16 2"]


def pack(kernel: Int8[np.ndarray, "in_features out_features"]) -> Int8[np.ndarray, "panels steps 16 4"]:
    """The panels of a kernel."""
    features, outputs = kernel.shape
    padded = np.pad(kernel, ((0, -features % INPUTS), (0, -outputs % OUTPUTS)))
    split = padded.reshape(padded.shape[0] // INPUTS, INPUTS, padded.shape[1] // OUTPUTS, OUTPUTS)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def pack_int4(kernel: Int8[np.ndarray, "in_features out_features"]) -> UInt8[np.ndarray, "panels steps 16 2"]:
    """The panels of a kernel of numbers from -8 to 7, two in a byte."""
    steps = pack(kernel).view(np.uint8)
    return (steps[..., :2] & 15) | (steps[..., 2:] << 4)


def unpack(panels: Panels, features: int) -> Int8[Array, "in_features _"]:
    """The kernel of so many inputs, with the zeros behind its last output."""
    if panels.dtype == jnp.uint8:
        panels = _steps_of_int4(panels)
    count, steps, outputs, inputs = panels.shape
    return jnp.transpose(panels, (1, 3, 0, 2)).reshape(steps * inputs, count * outputs)[:features]


def outputs(panels: Int8[Array, "_ _ 16 4"], numbers: Int[Array, "*shape"], features: int) -> Int8[Array, "*shape _"]:
    """The weights of some outputs, by number."""
    steps = panels[numbers // OUTPUTS, :, numbers % OUTPUTS]
    return steps.reshape(*numbers.shape, -1)[..., :features]


def _steps_of_int4(panels: UInt8[Array, "panels steps 16 2"]) -> Int8[Array, "panels steps 16 4"]:
    signed = lax.bitcast_convert_type(panels, jnp.int8)
    # Shifts to the right repeat the sign.
    return jnp.concatenate([(signed << 4) >> 4, signed >> 4], axis=-1)
