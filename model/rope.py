"""Rotary position embedding: parameters from a config in any spelling, inverse frequencies, tables of cos and sin.

Sources: RoFormer (Su et al., arXiv 2104.09864); linear and dynamic NTK scaling as transformers computes them; the
frequency-wise scaling of Llama 3.1; YaRN (Peng et al., arXiv 2309.00071); LongRoPE (Ding et al., arXiv 2402.13753).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from ..attention.blocks import pad_axis
from .config import read_boolean, read_choice, read_integer, read_number, require


@dataclass(frozen=True)
class Rope:
    """Parameters of the rotary embedding.

    Attributes:
        rope_type: "default", "linear" (all frequencies divided by `factor`), "dynamic" (the base grows with the row's
            length), "llama3" (low frequencies divided by `factor`, high ones kept, a ramp between), "yarn" (the same
            with another ramp) or "longrope" (each frequency divided by a factor of its own).
        rope_theta: base of the geometric series of wavelengths.
        partial_rotary_factor: share of each head's dimensions that is rotated, from the first on.
        factor: by how much the context was stretched (linear, dynamic, llama3 and yarn).
        low_freq_factor, high_freq_factor: llama3 only; wavelengths above `original / low` are scaled, below
            `original / high` kept.
        original_max_position_embeddings: context before stretching, in tokens (all but default and linear).
        attention_factor: cosines and sines are multiplied by it (yarn and longrope).
        beta_fast, beta_slow: yarn only; dimensions that turn more often than `beta_fast` times in the original context
            are kept, those that turn less often than `beta_slow` times scaled.
        truncate: yarn only; whether the ends of the ramp are rounded to whole dimensions.
        short_factor, long_factor: longrope only; what each frequency is divided by in rows of up to
            `original_max_position_embeddings` tokens, and in longer ones.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """Over how many dimensions of a head the frequencies are spread."""
        return int(head_dim * self.partial_rotary_factor)

    def max_tokens(self, max_position_embeddings: int) -> int | None:
        """Tokens that a row may have; None for "dynamic", which stretches for any length.

        Configs with "linear" or "yarn" often give the context before stretching as `max_position_embeddings`: there
        the limit is what the factor makes of it, which is never less than was trained.
        """
        if self.rope_type == "dynamic":
            return None
        if self.rope_type == "linear":
            return int(max_position_embeddings * max(self.factor, 1.0))
        if self.rope_type == "yarn":
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings

    def check(self, head_dim: int) -> None:
        """ValueError if heads of this size cannot be rotated so."""
        rotary_dim = self.rotary_dim(head_dim)
        pairs = -(-rotary_dim // 2)
        least = 3 if self.rope_type == "dynamic" else 1
        if rotary_dim < least or 2 * pairs > head_dim:
            raise ValueError(
                f"config: head_dim is {head_dim}, of which {rotary_dim} dimensions rotate (partial_rotary_factor is "
                f"{self.partial_rotary_factor}), expected pairs that fit the head, above 2 if rope is dynamic"
            )
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            if (given := len(getattr(self, name))) != pairs:
                raise ValueError(f"config: {name} has {given} numbers, expected {pairs}, one per pair of dimensions")


_TABLE_PIECES = 4


class RotaryTables(NamedTuple):
    """Cosine and sine of every position's angles, in float32, times the attention factor."""

    cos: Float32[Array, "batch tokens pairs"]
    sin: Float32[Array, "batch tokens pairs"]


def rope_from_config(
    config: Mapping[str, Any],
    max_position_embeddings: int,
    *,
    default_theta: float = 10000.0,
    default_partial_rotary_factor: float | None = None,
    theta_field: str = "rope_theta",
    partial_rotary_field: str = "partial_rotary_factor",
    older_types: Mapping[str, str] | None = None,
) -> Rope:
    """The rotary parameters of a config, as transformers 5 spells them (`rope_parameters`) or as older ones do.

    As in transformers, `rope_scaling` wins where both are given, and what is inside wins over what is outside; but an
    `original_max_position_embeddings` outside wins over one inside.

    Args:
        config: the Hugging Face config.
        max_position_embeddings: its field of that name, or the architecture's default.
        default_theta: base where the config gives none.
        default_partial_rotary_factor: share of the head that is rotated where the config gives none; None if the
            architecture always rotates all of it.
        theta_field, partial_rotary_field: names of these two outside of `rope_parameters`.
        older_types: names that the architecture once had for rope types, to today's.

    Raises:
        ValueError: an unsupported type, or a parameter that is missing or out of range.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    inside = _object(config, name)
    if nested := [key for key, value in inside.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"config: {name} has parameters per layer type ({', '.join(nested)}), supported: one set for all"
        )
    if default_partial_rotary_factor is None:
        require(config, partial_rotary_field, 1.0)
        require(inside, "partial_rotary_factor", 1.0)
    outside = {
        "rope_theta": read_number(config, theta_field, default_theta),
        "partial_rotary_factor": read_number(config, partial_rotary_field, default_partial_rotary_factor or 1.0),
    }
    original = {"original_max_position_embeddings": config.get("original_max_position_embeddings")}
    parameters = {**outside, **_given(inside), **_given(original)}
    return _rope(parameters, max_position_embeddings, older_types or {})


def ropes_from_config(
    config: Mapping[str, Any],
    max_position_embeddings: int,
    layer_types: Iterable[str],
    *,
    theta_fields: Mapping[str, str],
    default_thetas: Mapping[str, float],
    scaled: Collection[str],
) -> dict[str, Rope]:
    """The rotary parameters by layer type, for architectures whose layer types have parameters of their own.

    As in transformers, `rope_parameters` has one object per layer type; in older configs each type has a base in a
    field of its own, and `rope_scaling` holds for some of the types.

    Args:
        config: the Hugging Face config.
        max_position_embeddings: its field of that name, or the architecture's default.
        layer_types: the types that the model's layers have; repetitions do not matter.
        theta_fields: by layer type, the name of the older field with its base.
        default_thetas: by layer type, the base where the config gives none.
        scaled: the layer types that `rope_scaling` holds for.

    Raises:
        ValueError: an unsupported type, or a parameter that is missing or out of range.
    """
    by_type, scaling = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    if flat := [key for key, value in by_type.items() if not isinstance(value, Mapping | None)]:
        raise ValueError(
            f"config: rope_parameters has {', '.join(flat)} outside of a layer type, expected one object for each of "
            f"{', '.join(theta_fields)}"
        )
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError("config: rope_scaling has no rope_type and is not read by its type here: rename that field")
    ropes = {}
    for layer_type in sorted(set(layer_types)):
        inside = {**_object(by_type, layer_type), **(scaling if layer_type in scaled else {})}
        # Heads rotate as a whole here, and transformers does not read `truncate` inside of a layer type.
        require(inside, "partial_rotary_factor", 1.0)
        require(inside, "truncate", True)
        theta = read_number(config, theta_fields[layer_type], default_thetas[layer_type])
        ropes[layer_type] = _rope({"rope_theta": theta, **_given(inside)}, max_position_embeddings, {})
    return ropes


def inverse_frequencies(rope: Rope, head_dim: int, lengths: Int[Array, " batch"]) -> Float32[Array, "rows pairs"]:
    """Radians per token of each pair of dimensions.

    One row per batch row for "dynamic" and "longrope", where they depend on the row's length; one for all otherwise.
    """
    rotary_dim = rope.rotary_dim(head_dim)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    # Rounded where transformers rounds: at position 10^5 a last bit of the frequency is visible in the angle.
    periods = np.power(rope.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / periods
    if rope.rope_type == "dynamic":
        return jnp.asarray(frequencies) * _dynamic(rope, rotary_dim, lengths)
    if rope.rope_type == "longrope":
        short, long = (
            1 / (np.asarray(factors, np.float32) * periods) for factors in (rope.short_factor, rope.long_factor)
        )
        return jnp.where(lengths[:, None] > rope.original_max_position_embeddings, long, short)
    if rope.rope_type == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        frequencies = _llama3(rope, frequencies)
    if rope.rope_type == "yarn":
        frequencies = _yarn(rope, rotary_dim, periods)
    return jnp.asarray(frequencies)[None]


def rotary_tables(
    rope: Rope, head_dim: int, positions: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
) -> RotaryTables:
    """The tables for tokens at absolute `positions` of rows that are `lengths` tokens long in all."""
    frequencies = inverse_frequencies(rope, head_dim, lengths)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    # A loop, because XLA would else compute sines and cosines where they are used: anew in every layer and head.
    pieces = pad_axis(angles, 1, _TABLE_PIECES).reshape(angles.shape[0], _TABLE_PIECES, -1, angles.shape[2])
    scale = rope.attention_factor
    cos, sin = lax.map(lambda piece: (jnp.cos(piece) * scale, jnp.sin(piece) * scale), pieces.swapaxes(0, 1))
    tokens = positions.shape[1]
    return RotaryTables(
        *(table.swapaxes(0, 1).reshape(angles.shape[0], -1, angles.shape[2])[:, :tokens] for table in (cos, sin))
    )


def apply_rotary(
    x: Float[Array, "batch heads tokens head_dim"], tables: RotaryTables
) -> Float[Array, "batch heads tokens head_dim"]:
    """Rotates the pairs (i, i + pairs) of every head, in float32, and returns x's dtype.

    Dimensions beyond those of the tables' pairs stay as they are.
    """
    pairs = tables.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config: {name} is {value!r}, expected an object or null")
    return value


def _given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _rope(parameters: Mapping[str, Any], max_position_embeddings: int, older_types: Mapping[str, str]) -> Rope:
    given = parameters.get("rope_type", parameters.get("type"))
    rope_type = read_choice({"rope_type": older_types.get(str(given), given)}, "rope_type", ROPE_TYPES, "default")
    partial_rotary_factor = read_number(parameters, "partial_rotary_factor", 1.0)
    if partial_rotary_factor > 1:
        raise ValueError(f"config: partial_rotary_factor is {partial_rotary_factor}, expected at most 1")
    return Rope(
        rope_type=rope_type,
        rope_theta=read_number(parameters, "rope_theta"),
        partial_rotary_factor=partial_rotary_factor,
        **_READERS[rope_type](parameters, max_position_embeddings),
    )


def _read_default(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    return {}


def _read_linear(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    return {"factor": read_number(parameters, "factor")}


def _read_dynamic(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    # transformers measures the stretch by this one, whatever original_max_position_embeddings says.
    return {"factor": read_number(parameters, "factor"), "original_max_position_embeddings": max_position_embeddings}


def _read_llama3(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    low, high = read_number(parameters, "low_freq_factor"), read_number(parameters, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"config: high_freq_factor is {high} and low_freq_factor is {low}, expected the first to be larger"
        )
    return {
        "factor": read_number(parameters, "factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _read_original(parameters, max_position_embeddings),
    }


def _read_yarn(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    original = _read_original(parameters, max_position_embeddings)
    factor = read_number(parameters, "factor", max_position_embeddings / original)
    fast, slow = _read_unless_zero(parameters, "beta_fast", 32.0), _read_unless_zero(parameters, "beta_slow", 1.0)
    if fast < slow:
        raise ValueError(f"config: beta_fast is {fast} and beta_slow is {slow}, expected the first to be larger")
    if (theta := parameters["rope_theta"]) == 1:
        raise ValueError(f"config: rope_theta is {theta}, expected another base for rope_type 'yarn'")
    mscale, all_dim = (_read_unless_zero(parameters, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
    else:
        attention_factor = _yarn_scale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": read_number(parameters, "attention_factor", attention_factor),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": read_boolean(parameters, "truncate", True),
    }


def _read_longrope(parameters: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    original = _read_original(parameters, max_position_embeddings)
    if original < 2:
        raise ValueError(f"config: original_max_position_embeddings is {original}, expected at least 2 for longrope")
    factor = read_number(parameters, "factor", max_position_embeddings / original)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_max_position_embeddings": original,
        "attention_factor": read_number(parameters, "attention_factor", attention_factor),
        "short_factor": _read_numbers(parameters, "short_factor"),
        "long_factor": _read_numbers(parameters, "long_factor"),
    }


_READERS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "default": _read_default,
    "dynamic": _read_dynamic,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "longrope": _read_longrope,
    "yarn": _read_yarn,
}

ROPE_TYPES = tuple(_READERS)


def _read_original(parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    return read_integer(parameters, "original_max_position_embeddings", max_position_embeddings)


def _read_unless_zero(parameters: Mapping[str, Any], name: str, default: float) -> float:
    """A number above 0, where 0 stands for the default, as it does in transformers."""
    return default if parameters.get(name) in (None, 0) else read_number(parameters, name)


def _read_numbers(parameters: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = parameters.get(name)
    if not isinstance(values, list | tuple):
        raise ValueError(f"config: {name} is {values!r}, expected a list of numbers")
    return tuple(read_number({f"{name}[{index}]": value}, f"{name}[{index}]") for index, value in enumerate(values))


def _dynamic(rope: Rope, rotary_dim: int, lengths: Int[Array, " batch"]) -> Float32[Array, "batch pairs"]:
    """The base times growth^(d / (d - 2)), as a factor on each frequency that is exactly 1 for short rows."""
    stretch = lengths.astype(jnp.float32) / rope.original_max_position_embeddings
    growth = rope.factor * jnp.maximum(stretch, 1.0) - (rope.factor - 1.0)
    return growth[:, None] ** (-np.arange(0, rotary_dim, 2, dtype=np.float32) / (rotary_dim - 2))


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    wavelengths = 2 * math.pi / frequencies
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / rope.factor + kept * frequencies).astype(np.float32)


def _yarn(rope: Rope, rotary_dim: int, periods: np.ndarray) -> np.ndarray:
    """A ramp from kept to scaled frequencies over the index of the pair."""
    first, last = (_yarn_pair(rope, rotary_dim, rotations) for rotations in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    # A ramp of no width is a step.
    width = last - first or 0.001
    scaled = np.clip((np.arange(len(periods), dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    kept = np.float32(1) - scaled
    return 1 / (np.float32(rope.factor) * periods) * (1 - kept) + 1 / periods * kept


def _yarn_pair(rope: Rope, rotary_dim: int, rotations: float) -> float:
    """Index of the pair that turns so often in the original context (section 3.2 of the paper)."""
    turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
    return rotary_dim * math.log(turns) / (2 * math.log(rope.rope_theta))


def _yarn_scale(factor: float, mscale: float) -> float:
    """Section 3.4 of the paper, with transformers' further factor on the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
