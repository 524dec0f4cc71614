"""weights.safetensors with every tensor on a 64-byte boundary, so that a memory map is what XLA computes from.

The format forbids holes, so tensors whose size is no multiple of 64 bytes come last, each followed by a tiny uint8
tensor named `__padding__.N`. Any safetensors reader opens the file.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .manifest import ArtifactError, FileInfo

ALIGNMENT = 64
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
    with path.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header, *(array for _, _, array in layout)):
            data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
        size = file.tell()
    return FileInfo(path.name, size, digest.hexdigest())


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only views into a memory map of the file, without the padding.

    Raises:
        ArtifactError: the header is not that of an aligned safetensors file.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: _view(data, start, entry) for name, entry in header.items() if not name.startswith(_PADDING)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} has a header that cannot be read ({error!r}): compile again") from error


def put_weights(arrays: Mapping[str, NDArray[Any]]) -> dict[str, jax.Array]:
    """The arrays on the CPU device, sharing memory with the map where their start is aligned."""
    device = jax.devices("cpu")[0]
    return {name: jax.device_put(array, device, may_alias=True) for name, array in arrays.items()}


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


def _view(data: mmap.mmap, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    dtype = _DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    count = (end - begin) // dtype.itemsize
    return np.frombuffer(data, dtype, count, start + begin).reshape(entry["shape"])
