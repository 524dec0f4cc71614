"""weights.safetensors with every tensor on a 64-byte boundary, so that a memory map is what XLA computes from.

The format forbids holes, so tensors whose size is no multiple of 64 bytes come last, each followed by a tiny uint8
tensor named `__padding__.N`. Any safetensors reader opens the file.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..host import strict_json
from ..host.environment import check_platforms
from ..host.files import naming
from .manifest import ArrayInfo, ArtifactError, FileInfo

ALIGNMENT = 64
_MAX_HEADER = 2**27
_MAX_DIMENSIONS = 32
_REMEDY = "copy the artifact again or compile it again"
_PADDING = "__padding__."
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_weights(path: Path, tensors: Mapping[str, NDArray[Any]]) -> FileInfo:
    """Writes the tensors one by one and gives the file's record.

    Raises:
        ValueError: a dtype that the file format does not know, or a name kept for padding.
    """
    layout = _layout(tensors)
    header = json.dumps({name: entry for name, entry, _ in layout}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    digest = hashlib.sha256()
    with naming(path), path.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header, *(array for _, _, array in layout)):
            data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
        size = file.tell()
    return FileInfo(path.name, size, digest.hexdigest())


def described(tensors: Mapping[str, NDArray[Any]]) -> dict[str, ArrayInfo]:
    """Shape and dtype of each."""
    return {name: ArrayInfo(array.shape, array.dtype.name) for name, array in tensors.items()}


def read_weights(path: Path, expected: Mapping[str, ArrayInfo]) -> dict[str, NDArray[Any]]:
    """Read-only views into a memory map of the file, without the padding.

    Args:
        path: the file.
        expected: shape and dtype of each tensor that it must hold, by name.

    Raises:
        ArtifactError: it is not a safetensors file, its tensors overlap, leave holes or lie outside of it, or they are
            not those that are expected.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ArtifactError(f"{path.name} is empty, expected weights: {_REMEDY}") from None
    header, start = _header(data, path.name)
    _check_layout(header, len(data) - start, path.name)
    found = {name: ArrayInfo(entry.shape, entry.dtype.name) for name, entry in header.items()}
    differing = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if not name.startswith(_PADDING) and found.get(name) != expected.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ArtifactError(f"{path.name} does not fit manifest.json ({differing[0]}{more}): {_REMEDY}")
    return {name: header[name].view(data, start) for name in expected}


def memory_map(views: Mapping[str, NDArray[Any]]) -> mmap.mmap:
    """The map of the file that these views of `read_weights` look into."""
    base: Any = next(iter(views.values()))
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, memoryview)
    assert isinstance(base.obj, mmap.mmap)
    return base.obj


def cpu_device() -> Any:
    """The device that everything runs on.

    Raises:
        ValueError: JAX_PLATFORMS leaves it out.
    """
    check_platforms()
    return jax.devices("cpu")[0]


def put_weights(arrays: Mapping[str, NDArray[Any]]) -> dict[str, jax.Array]:
    """The arrays on the CPU device, sharing memory with the map where their start is aligned."""
    device = cpu_device()
    return {name: jax.device_put(array, device, may_alias=True) for name, array in arrays.items()}


@dataclass(frozen=True)
class _Tensor:
    """One entry of the header; `begin` and `end` count from the end of the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: mmap.mmap, start: int) -> NDArray[Any]:
        """The tensor in a file whose header ends at `start`."""
        return np.frombuffer(data, self.dtype, math.prod(self.shape), start + self.begin).reshape(self.shape)


def _header(data: mmap.mmap, name: str) -> tuple[dict[str, _Tensor], int]:
    """The tensors by name, and where the header ends."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
        raise ArtifactError(f"{name} has {len(data)} bytes and names a header of {length}: {_REMEDY}")
    try:
        header = strict_json.parse(data[8 : 8 + length], f"the header of {name}")
    except ValueError as error:
        raise ArtifactError(f"{error}: {_REMEDY}") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {name} is no object: {_REMEDY}")
    header.pop("__metadata__", None)
    return {tensor: _tensor(entry, f"{name} has {tensor!r}") for tensor, entry in header.items()}, 8 + length


def _tensor(entry: object, what: str) -> _Tensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ArtifactError(f"{what} of dtype {str(dtype)[:40]!r}, expected one of {', '.join(_DTYPES)}: {_REMEDY}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{what} without a shape and two data_offsets that are not negative: {_REMEDY}")
    begin, end = offsets
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != size:
        raise ArtifactError(f"{what} of shape {shape} and dtype {dtype} in {end - begin} bytes: {_REMEDY}")
    return _Tensor(_DTYPES[dtype], tuple(shape), begin, end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in value)


def _check_layout(tensors: Mapping[str, _Tensor], size: int, name: str) -> None:
    """Every byte behind the header belongs to one tensor."""
    position = 0
    for tensor, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise ArtifactError(f"{name} has {tensor!r} at byte {entry.begin}, which {fault}: {_REMEDY}")
        position = entry.end
    if position != size:
        raise ArtifactError(f"{name} holds {size} bytes of tensors, but its header names {position}: {_REMEDY}")


def _layout(tensors: Mapping[str, NDArray[Any]]) -> list[tuple[str, dict[str, Any], NDArray[Any]]]:
    """Name, header entry and data of each tensor in file order, padding included."""
    layout: list[tuple[str, dict[str, Any], NDArray[Any]]] = []
    position = 0

    def add(name: str, array: NDArray[Any]) -> None:
        nonlocal position
        entry = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        layout.append((name, entry, array))
        position += array.nbytes

    for name, array in sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, item[0])):
        if array.dtype not in _NAMES or name.startswith(_PADDING):
            raise ValueError(f"tensor {name} of dtype {array.dtype} cannot be written, expected one of {list(_DTYPES)}")
        add(name, array)
        if position % ALIGNMENT:
            add(f"{_PADDING}{len(layout)}", np.zeros(-position % ALIGNMENT, np.uint8))
    return layout
