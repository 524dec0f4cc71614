"""JSON from outside, read strictly: what it cannot mean, or could mean two ways, is refused in one sentence."""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 160
_MAX_DIGITS = 40
_SHOWN = 40


def parse(data: bytes | str, name: str) -> Any:
    """What a JSON text holds.

    Args:
        data: the text, bytes as UTF-8.
        name: of the file, for messages.

    Raises:
        ValueError: not JSON; NaN, an infinity or a number too large for any use; a key that an object has twice; or
            objects and lists nested deeper than `MAX_DEPTH`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_number,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(_too_deep(name)) from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON that can be read ({error})") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(_too_deep(name))
    return value


def _too_deep(name: str) -> str:
    return f"{name} is nested deeper than {MAX_DEPTH} levels, which nothing that it describes needs"


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant}, which is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it has {digits[:_SHOWN]}, which is too large for a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice[:_SHOWN]!r} twice")
    return found


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested deeper than so many levels, found without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
