"""JSON from outside, read strictly: what it cannot mean, or could mean two ways, is refused in one sentence."""

import codecs
import json
import math
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 128
"""As in serde_json, with which the tokenizers and safetensors packages read."""
_MAX_DIGITS = 40
_SHOWN = 40


def parse(data: bytes | str, name: str, *, lenient: bool = False) -> Any:
    """What a JSON text holds.

    Args:
        data: the text, bytes as UTF-8.
        name: of the file, for messages.
        lenient: whether to take what other writers leave and what has one meaning all the same: a byte order mark, NaN
            and infinities, and a key that has the same value twice.

    Raises:
        ValueError: not JSON; NaN, an infinity or a number too large for any use; a key that an object has twice; or
            objects and lists nested deeper than `MAX_DEPTH`.
    """
    options = {} if lenient else {"parse_constant": _refuse_constant, "parse_float": _number}
    try:
        if isinstance(data, bytes):
            data = (data.removeprefix(codecs.BOM_UTF8) if lenient else data).decode("utf-8")
        pairs = _object if lenient else _object_of_different_keys
        value = json.loads(data, parse_int=_integer, object_pairs_hook=pairs, **options)
    except RecursionError:
        raise ValueError(_too_deep(name)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid JSON (byte {error.start} is not UTF-8)") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(_too_deep(name))
    return value


def _too_deep(name: str) -> str:
    return f"{name} is nested too deeply, expected at most {MAX_DEPTH} levels"


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
        for name, value in pairs:
            if value != found[name]:
                raise ValueError(f"an object has two values for {name[:_SHOWN]!r}")
    return found


def _object_of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _object(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"an object has the key {names.most_common(1)[0][0][:_SHOWN]!r} twice")
    return found


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested deeper than so many levels, found without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True
