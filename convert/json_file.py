"""JSON files of a checkpoint, which may hold anything: read within bounds, with errors of one line."""

from pathlib import Path
from typing import Any

from ..host import strict_json
from ..host.messages import shown
from .readable import check_readable

MAX_BYTES = 2**28
"""What the largest known tokenizer.json takes, several times over."""


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
        return strict_json.parse(path.read_bytes(), shown(path), lenient=True)
    except ValueError as error:
        raise ValueError(f"{error}: download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `parse_json`, or the file holds something else.
    """
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} holds a {type(content).__name__}, expected a JSON object")
    return content
