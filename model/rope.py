"""Rotary position embedding: parameters from a config in either spelling, inverse frequencies, tables of cos and sin.

Sources: RoFormer (Su et al., arXiv 2104.09864); linear and dynamic NTK scaling as transformers computes them; the
frequency-wise scaling of Llama 3.1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from ..attention.blocks import pad_axis
from .config import read_choice, read_integer, read_number, require

ROPE_TYPES = ("default", "dynamic", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Parameters of the rotary embedding.

    Attributes:
        rope_type: "default", "linear" (all frequencies divided by `factor`), "dynamic" (the base grows with the row's
            length) or "llama3" (low frequencies divided by `factor`, high ones kept, a ramp between).
        rope_theta: base of the geometric series of wavelengths.
        factor: by how much the context was stretched.
        low_freq_factor, high_freq_factor: llama3 only; wavelengths above `original / low` are scaled, below
            `original / high` kept.
        original_max_position_embeddings: context before stretching, in tokens (llama3 and dynamic).
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


_TABLE_PIECES = 4


class RotaryTables(NamedTuple):
    """Cosine and sine of every position's angles, in float32."""

    cos: Float32[Array, "batch tokens half_head_dim"]
    sin: Float32[Array, "batch tokens half_head_dim"]


def rope_from_config(config: Mapping[str, Any], max_position_embeddings: int) -> Rope:
    """The rotary parameters of a config, as transformers 5 spells them (`rope_parameters`) or as older ones do.

    As in transformers, `rope_scaling` wins where both are given, and a `rope_theta` inside wins over one outside.

    Raises:
        ValueError: an unsupported type, or a parameter that is missing or out of range.
    """
    parameters = _parameters(config)
    rope_type = read_choice(parameters, "rope_type", ROPE_TYPES, "default")
    rope_theta = read_number(parameters, "rope_theta", 10000.0)
    require(parameters, "partial_rotary_factor", 1.0)
    if rope_type == "default":
        return Rope(rope_type, rope_theta)
    factor = read_number(parameters, "factor")
    if rope_type == "linear":
        return Rope(rope_type, rope_theta, factor)
    if rope_type == "dynamic":
        return Rope(rope_type, rope_theta, factor, original_max_position_embeddings=max_position_embeddings)
    low, high = read_number(parameters, "low_freq_factor"), read_number(parameters, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"config: high_freq_factor is {high} and low_freq_factor is {low}, expected the first to be larger"
        )
    original = read_integer(parameters, "original_max_position_embeddings", max_position_embeddings)
    return Rope(rope_type, rope_theta, factor, low, high, original)


def inverse_frequencies(
    rope: Rope, head_dim: int, lengths: Int[Array, " batch"]
) -> Float32[Array, "rows half_head_dim"]:
    """Radians per token of each pair of dimensions: one row per batch row for "dynamic", one for all otherwise."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Rounded where transformers rounds: at position 10^5 a last bit of the frequency is visible in the angle.
    frequencies = np.float32(1) / np.power(rope.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    if rope.rope_type == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        frequencies = _llama3(rope, frequencies)
    if rope.rope_type != "dynamic":
        return jnp.asarray(frequencies)[None]
    # The base times growth^(d / (d - 2)), written as a factor on each frequency that is exactly 1 for short rows.
    stretch = lengths.astype(jnp.float32) / rope.original_max_position_embeddings
    growth = rope.factor * jnp.maximum(stretch, 1.0) - (rope.factor - 1.0)
    return jnp.asarray(frequencies) * growth[:, None] ** (-np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim - 2))


def rotary_tables(
    rope: Rope, head_dim: int, positions: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
) -> RotaryTables:
    """The tables for tokens at absolute `positions` of rows that are `lengths` tokens long in all."""
    frequencies = inverse_frequencies(rope, head_dim, lengths)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    # A loop, because XLA would else compute sines and cosines where they are used: anew in every layer and head.
    pieces = pad_axis(angles, 1, _TABLE_PIECES).reshape(angles.shape[0], _TABLE_PIECES, -1, angles.shape[2])
    cos, sin = lax.map(lambda piece: (jnp.cos(piece), jnp.sin(piece)), pieces.swapaxes(0, 1))
    tokens = positions.shape[1]
    return RotaryTables(
        *(table.swapaxes(0, 1).reshape(angles.shape[0], -1, angles.shape[2])[:, :tokens] for table in (cos, sin))
    )


def apply_rotary(
    x: Float[Array, "batch heads tokens head_dim"], tables: RotaryTables
) -> Float[Array, "batch heads tokens head_dim"]:
    """Rotates the pairs (i, i + head_dim / 2) of every head, in float32, and returns x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(name) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config: {name} is {parameters!r}, expected an object or null")
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"config: {name} has parameters per layer type ({', '.join(nested)}), supported is one set for all"
        )
    outside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    inside = {key: value for key, value in parameters.items() if value is not None}
    return {**outside, "rope_type": inside.get("type"), **inside}


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    wavelengths = 2 * math.pi / frequencies
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / rope.factor + kept * frequencies).astype(np.float32)
