"""Reading the header of a GGUF file: its metadata, and where its tensors lie. No tensor's data is touched.

Every count, length and offset is checked before anything of that size is read or made, so a damaged file costs neither
time nor memory. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from ...host.messages import shown
from .types import block_of, type_name

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LFS_POINTER = b"version https://git-lfs"
_DEFAULT_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**16
_MOST_DIMENSIONS = 4
# Far above what any model has; the largest vocabularies have 10^6 entries between tokens, merges and scores.
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS, _MOST_TEXT = 2**14, 2**18, 2**23, 2**26
# By the number of the type, as `struct` spells them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: that holds it.
        shape: the slowest dimension first, as in numpy.
        type: its number in ggml's list of types.
        start: of its data, in bytes from the beginning of the file.
        size: of its data, in bytes.
    """

    file: Path
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says before its data.

    Attributes:
        path: the file.
        metadata: by key; whole numbers, floats, booleans, texts and lists of these.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no GGUF file, of another version or byte order, truncated or corrupt, or has a tensor of a
            type that is not known.
    """
    with path.open("rb") as opened:
        _check_magic(path, opened.read(len(_LFS_POINTER)))
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()


def _check_magic(path: Path, start: bytes) -> None:
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: fetch it with `git lfs pull`")
    if not start.startswith(MAGIC):
        raise ValueError(
            f"{path} is not a GGUF file (it begins with {start[:4]!r}, expected {MAGIC!r}): download it again"
        )


class _Reader:
    """Goes through a header once, from its beginning to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, len(MAGIC)
        self.elements_left = _MOST_ELEMENTS

    def header(self) -> Header:
        self._check_version()
        tensor_count = self._count("tensors", _MOST_TENSORS)
        metadata = self._metadata(self._count("metadata keys", _MOST_KEYS))
        entries = self._entries(tensor_count)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._corrupt(f"general.alignment is {alignment!r}, expected a power of 2 up to {_MOST_ALIGNMENT}")
        start = -(-self.position // alignment) * alignment
        return Header(self.path, metadata, self._placed(entries, start, alignment))

    def _check_version(self) -> None:
        version = self._number("I")
        if version in _VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            raise ValueError(f"{self.path} is a big-endian GGUF file, only little-endian files are supported")
        if version == 1:
            raise ValueError(f"{self.path} is a GGUF file of version 1, supported: {_VERSIONS}: convert it again")
        raise ValueError(f"{self.path} is a GGUF file of version {version}, supported: {_VERSIONS}")

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in metadata:
                raise self._corrupt(f"the key {shown(key)} occurs twice")
            metadata[key] = self._value(self._number("I"), key)
        return metadata

    def _entries(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text()
            dimensions = self._number("I")
            if name in entries or not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._corrupt(f"{shown(name)} occurs twice or has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            entries[name] = shape, self._number("I"), self._number("Q")
        return entries

    def _placed(
        self, entries: Mapping[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        tensors = {}
        for name, (shape, number, offset) in entries.items():
            known = block_of(number)
            if known is None:
                raise ValueError(f"{self.path}: {shown(name)} is of type {number}, which is unknown: upgrade `gguf`")
            elements, size = known
            if 0 in shape or shape[-1] % elements:
                kind = type_name(number)
                raise self._corrupt(
                    f"{shown(name)} is {list(shape)}, but a row of {kind} consists of blocks of {elements} numbers"
                )
            tensor = StoredTensor(self.path, shape, number, start + offset, prod(shape) // elements * size)
            if offset % alignment or tensor.start + tensor.size > len(self.data):
                raise self._corrupt(
                    f"{shown(name)} lies at {tensor.start} to {tensor.start + tensor.size} of {len(self.data)} bytes"
                )
            tensors[name] = tensor
        by_start = sorted(tensors.items(), key=lambda entry: entry[1].start)
        for (first, tensor), (second, next_tensor) in pairwise(by_start):
            if tensor.start + tensor.size > next_tensor.start:
                raise self._corrupt(f"{shown(first)} and {shown(second)} overlap")
        return tensors

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._corrupt(f"{shown(key)} is of type {kind}")
        kind, count = self._number("I"), self._count(f"elements of {shown(key)}", self.elements_left)
        self.elements_left -= count
        if kind == _STRING:
            return self._texts(count)
        if kind not in _SCALARS:
            raise self._corrupt(f"{shown(key)} is an array of type {kind}")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _text(self) -> str:
        return self._texts(1)[0]

    def _texts(self, count: int) -> list[str]:
        """So many texts; a loop by itself, because vocabularies have hundreds of thousands."""
        data, position, size, texts = self.data, self.position, len(self.data), []
        for _ in range(count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            if position > size or start > size or position - start > _MOST_TEXT:
                raise self._corrupt(f"a text of {position - start} bytes extends past the end of the file")
            # Texts of any encoding occur in descriptions.
            texts.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return texts

    def _count(self, what: str, most: int) -> int:
        count = self._number("Q")
        if count > most:
            raise self._corrupt(f"it claims {count} {what}")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise self._corrupt("its header extends past the end of the file")
        taken, self.position = self.data[self.position : end], end
        return taken

    def _corrupt(self, found: str) -> ValueError:
        return ValueError(f"{self.path} is truncated or corrupt ({found}): download it again")
