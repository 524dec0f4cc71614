"""Frozen dataclasses from JSON, strictly: exactly their fields, of exactly the annotated types."""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

_TYPES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_MAX_INTEGER = 2**63 - 1

Record = TypeVar("Record")


class _MisfitError(ValueError):
    """What does not fit, without the name of the file."""


def read_record(cls: type[Record], value: object, file: str) -> Record:
    """A dataclass from a JSON object with exactly its fields, which may be dataclasses again.

    Raises:
        ValueError: a field that is missing, unknown or of another type, with the file's name before it; and whatever
            the dataclasses themselves refuse.
    """
    try:
        return _record(cls, value, "")
    except _MisfitError as error:
        raise ValueError(f"{file} {error}") from None


def _record(cls: type[Record], value: object, where: str) -> Record:
    """A dataclass from a JSON object with exactly its fields."""
    if not isinstance(value, dict):
        raise _mismatch(where, value, "an object")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    missing, unknown = hints.keys() - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        name = min(missing or unknown)
        raise _MisfitError(f"{'lacks' if missing else 'has an unknown'} field {prefix}{name}")
    return cls(**{name: _parse(hint, value[name], prefix + name) for name, hint in hints.items()})


def _parse(hint: Any, value: object, where: str) -> Any:
    """A value of the annotated type: a dataclass, tuple, dict, optional or plain JSON type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, value, "a list")
        return tuple(_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, value, "an object")
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _mismatch(where, value, _TYPES[hint])
    if hint is int and not 0 <= typing.cast(int, value) <= _MAX_INTEGER:
        raise _mismatch(where, value, "an integer that is not negative and below 2^63")
    return value


def _mismatch(where: str, value: object, expected: str) -> _MisfitError:
    found = json.dumps(value)
    found = found if len(found) <= 40 else found[:40] + "…"
    return _MisfitError(f"has {found} in {where or 'its root'}, expected {expected}")
