"""Seeded damage to files: bytes anywhere, and values inside of JSON."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[random.Random, Path], None]

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**5, 2**31, 2**53, 2**63, 10**12, -(2**63), 10**30),
    *(0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("", "x", "\x1b[2J", "\ud800", "../../etc/passwd", "float16", "n" * 5000),
    *([], {}, [None], [[]], [1, 2], {"a": 1}, [0] * 3000, {"rope_type": "yarn"}),
)


def change_bytes(rng: random.Random, file: Path) -> None:
    """Up to four changes: a bit, a byte, a run of bytes doubled, left out or zeroed, or the file's end cut off.

    The beginning and the end, where headers and directories are, are hit as often as the rest.
    """
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        near = min(len(data), 2000)
        start = rng.choice((rng.randrange(near), len(data) - 1 - rng.randrange(near), rng.randrange(len(data))))
        end = start + rng.choice((1, 2, 8, rng.randint(1, 300)))
        match rng.randrange(7):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start] = rng.randrange(256)
            case 2:
                data[start:start] = data[start:end]
            case 3:
                del data[start:end]
            case 4:
                data[start:end] = bytes(len(data[start:end]))
            case 5:
                del data[start:]
            case _:
                data[start : start + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)))
    file.write_bytes(data)


def change_json(rng: random.Random, file: Path) -> None:
    """One to three values, anywhere inside, changed to odd ones, taken away, copied elsewhere or wrapped."""
    content = [json.loads(file.read_text())]
    for _ in range(rng.randint(1, 3)):
        change_value(rng, content)
    file.write_text(json.dumps(content[0]))


def change_value(rng: random.Random, content: Any) -> None:
    """One value inside of a list or object."""
    places = list(_places(content))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
        case 3 if isinstance(holder, dict):
            del holder[key]
        case 4:
            other, elsewhere = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[elsewhere]))
        case _:
            holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, str(holder[key])))


def change_header(rng: random.Random, file: Path) -> None:
    """Values inside of the header of a safetensors file, whose data stay as they are."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = [json.loads(data[8 : 8 + length])]
    change_value(rng, content)
    header = json.dumps(content[0]).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _places(content: Any) -> Any:
    """Every holder and key inside, those far down as often as those at the top."""
    level = [content]
    while level:
        inner = []
        for holder in level:
            for key in holder if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                if isinstance(holder[key], dict | list):
                    inner.append(holder[key])
        level = inner
