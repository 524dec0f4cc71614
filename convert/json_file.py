"""JSON files of a checkpoint, which may hold anything: read within bounds, with errors of one line."""

import json
from pathlib import Path
from typing import Any

from .problems import shown
from .readable import check_readable

MAX_BYTES = 2**28
"""What the largest known tokenizer.json takes, several times over."""
_MAX_DEPTH = 128
"""As in serde_json, with which the tokenizers and safetensors packages read."""
_MAX_DIGITS = 40


def parse_json(path: Path) -> Any:
    """What a JSON file holds; a byte order mark in front is left out.

    Raises:
        FileNotFoundError, PermissionError: there is none, or it must not be read.
        ValueError: it is not JSON in UTF-8, gives a name two values, nests too deeply or is too large.
    """
    check_readable(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{shown(path)} has {size} bytes, expected at most {MAX_BYTES}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object, parse_int=_integer)
        _check_depth(content)
    except RecursionError as error:
        raise ValueError(f"{shown(path)} is nested too deeply, expected at most {_MAX_DEPTH} levels") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)} is not valid JSON (byte {error.start} is not UTF-8): download it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{shown(path)} is not valid JSON ({shown(error)}): download it again") from error
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `parse_json`, or the file holds something else.
    """
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} holds a {type(content).__name__}, expected a JSON object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for name, value in pairs:
            if value != content[name]:
                raise ValueError(f"{name!r} has two values in one object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    """RecursionError if lists and objects are inside of one another more than `_MAX_DEPTH` times."""
    level = [content]
    for _ in range(_MAX_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    raise RecursionError
