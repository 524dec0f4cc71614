"""Sliding windows of a config's layers: one for all of them, or by the types that `layer_types` gives."""

from collections.abc import Mapping, Sequence
from typing import Any

from .config import read_integer

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(config: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window` in tokens; unlike in other fields null is not the default but means none.

    Raises:
        ValueError: it is something else than a whole number of at least 1, or null.
    """
    if config.get("sliding_window", default) is None:
        return None
    return read_integer(config, "sliding_window", default)


def read_layer_types(config: Mapping[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, one of `FULL` and `SLIDING` for each layer; the default has one for each, too.

    Raises:
        ValueError: another type, or another number of layers.
    """
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    known = isinstance(types, list | tuple) and all(kind in (FULL, SLIDING) for kind in types)
    if not known or len(types) != len(default):
        raise ValueError(
            f"config: layer_types is {types!r}, expected {FULL!r} or {SLIDING!r} for each of {len(default)} layers"
        )
    return tuple(types)


def windows_by_type(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Each layer's window.

    Raises:
        ValueError: there are sliding layers, but no window.
    """
    if window is None and SLIDING in layer_types:
        raise ValueError(
            f"config: layer_types has {SLIDING!r}, but sliding_window is null or switched off by use_sliding_window: "
            "expected a number of tokens"
        )
    return tuple(window if layer_type == SLIDING else None for layer_type in layer_types)
