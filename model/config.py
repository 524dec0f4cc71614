"""Checked reading of a Hugging Face config: typed fields with defaults, and errors that name the field.

A field that is absent or null takes its default, as in transformers.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 10_000
MAX_NUMBER = 1e30
"""Whose products with other fields are finite."""


def read_integer(
    config: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1, most: int = MAX_INTEGER
) -> int:
    """A whole number from `least` to `most`; ValueError if it is something else, or absent without a default."""
    value = _value(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"config: {name} is {value!r}, expected a whole number of at least {least}")
    if value > most:
        raise ValueError(f"config: {name} is {value}, expected a whole number of at most {most}")
    return value


def read_layers(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of layers, for each of which a config holds a few things; ValueError as `read_integer`."""
    return read_integer(config, name, default, most=MAX_LAYERS)


def read_pair(config: Mapping[str, Any], name: str, default: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width, from a whole number of at least 1 for both or a list of two; ValueError for something else."""
    value = _value(config, name, default)
    pair = value if isinstance(value, list | tuple) else [value] * 2
    if len(pair) != 2:
        raise ValueError(
            f"config: {name} is {value!r}, expected a whole number of at least 1, or two for height and width"
        )
    height, width = (read_integer({name: size}, name) for size in pair)
    return height, width


def read_number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0, up to `MAX_NUMBER`; ValueError if it is something else, or absent without a default."""
    value = _value(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
        raise ValueError(f"config: {name} is {value!r}, expected a number above 0, and at most {MAX_NUMBER:g}")
    return float(value)


def read_optional_number(config: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """A finite number above 0, or None, which unlike in other fields is what null stands for; ValueError if it is
    something else.
    """
    value = config.get(name, default)
    return None if value is None else read_number({name: value}, name)


def read_boolean(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false; ValueError if it is something else."""
    value = _value(config, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"config: {name} is {value!r}, expected true or false")
    return value


def read_choice(config: Mapping[str, Any], name: str, choices: Iterable[str], default: str) -> str:
    """One of `choices`; ValueError, with all of them, if it is something else."""
    value = _value(config, name, default)
    if value not in (supported := sorted(choices)):
        raise ValueError(f"config: {name} is {value!r}, supported: {', '.join(supported)}")
    return value


def require(config: Mapping[str, Any], name: str, supported: object) -> None:
    """ValueError unless the field is absent, null or `supported`."""
    value = config.get(name)
    if value is not None and value != supported:
        raise ValueError(f"config: {name} is {json.dumps(value)}, supported: only {json.dumps(supported)}")


def ignored(config: Mapping[str, Any], **usual: object) -> tuple[str, ...]:
    """What a config asks for in fields that transformers reads but does not apply: neither null nor the usual value."""
    return tuple(
        f"{name} is {json.dumps(config[name])}"
        for name, value in usual.items()
        if config.get(name) is not None and config[name] != value
    )


def with_own_names(config: Mapping[str, Any], own_names: Mapping[str, str]) -> dict[str, Any]:
    """The config with an architecture's own names for fields that it gives under those of others.

    As in transformers, which reads both, a value under the other name wins.
    """
    return {**config, **{own: config[name] for name, own in own_names.items() if config.get(name) is not None}}


def _value(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is not None:
        return value
    if default is None:
        raise ValueError(f"config: {name} is missing")
    return default
