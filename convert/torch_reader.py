"""Reading a file that `torch.save` wrote, with the `torch` extra: tensors only, code that it carries is never run.

Files in torch's zip format are mapped, and hold no memory beside the tensor that is read. Those of torch before 1.6
cannot be mapped: they are read whole.
"""

import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..host.messages import joined, listed, shown
from .readable import check_readable
from .tensor_file import TensorInfo, read_mapped

if TYPE_CHECKING:
    import torch

_ZIP, _PICKLE = b"PK", b"\x80"
_MAX_PICKLE_BYTES = 2**24
"""Of the names, shapes and strides: a hundred thousand tensors and more."""
_MAX_SHARING = 8
# torch allows a pickle to ask for an array of zeros of any length.
_ZEROS = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
# torch's names to those of safetensors; whatever else there is keeps torch's own.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class TorchFile:
    """One `*.bin`, `*.pt`, `*.pth` or `*.ckpt` with a state dict, bare or as the only one in a trainer's dict."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]:
        """What the file holds, by name.

        Raises:
            ModuleNotFoundError: torch is not installed.
            ValueError: the file is truncated or corrupt, holds anything that would run code, or no single state dict.
        """
        (_check_zip if self._is_zip() else _check_pickle)(self.path)
        return {
            name: TensorInfo(self.path, tuple(tensor.shape), _dtype_name(tensor))
            for name, tensor in self._state_dict().items()
        }

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once; ValueError if the file is no longer readable."""
        if self._is_zip():
            yield from read_mapped(self.infos(), self._getter)
        else:
            state = self._state_dict()
            while state:  # Each leaves memory as it is read.
                name = next(iter(state))
                yield name, _to_numpy(self.path, name, state.pop(name))

    def read_one(self, name: str) -> np.ndarray:
        """One tensor; ValueError if the file is no longer readable."""
        with self._getter() as get:
            return get(name)

    @contextmanager
    def _getter(self) -> Iterator[Callable[[str], np.ndarray]]:
        state = self._state_dict()
        try:
            yield lambda name: _to_numpy(self.path, name, state[name])
        finally:
            state.clear()

    def _is_zip(self) -> bool:
        check_readable(self.path)
        with self.path.open("rb") as opened:
            start = opened.read(2)
        if not start.startswith((_ZIP, _PICKLE)):
            raise _corrupt(self.path, "torch.save did not write it")
        return start == _ZIP

    def _state_dict(self) -> "dict[str, torch.Tensor]":
        torch, mapped = _torch(self.path), self._is_zip()
        try:
            with warnings.catch_warnings(action="ignore"):  # of old pickle protocols
                content = torch.load(self.path, weights_only=True, mmap=mapped, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{shown(self.path)} holds more than tensors ({shown(_reason(error))}), and other pickled "
                "objects can run code: it was not opened; save only the model's state_dict(), or use safetensors"
            ) from error
        except Exception as error:
            # torch's readers raise errors of many kinds for files that are damaged.
            raise _corrupt(self.path, _reason(error)) from error
        state = _unwrap(self.path, content)
        _check_tensors(self.path, state)
        return state


def _check_zip(path: Path) -> None:
    """ValueError for a zip file that torch would take more memory to read than it is long, or cannot read so."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename.rpartition("/")[2] for record in records}
            pickles = [record for record in records if record.filename.endswith("data.pkl")]
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            large = sum(record.file_size for record in records) > path.stat().st_size
            large = large or any(record.file_size > _MAX_PICKLE_BYTES for record in pickles)
            zeros = not packed and not large and any(_ZEROS.search(archive.read(record)) for record in pickles)
    except Exception as error:
        # As of torch's readers, there are errors of many kinds.
        raise _corrupt(path, _reason(error)) from error
    if "constants.pkl" in names:
        raise ValueError(f"{shown(path)} is a TorchScript program, expected the model's state_dict() alone")
    if packed:
        raise _corrupt(path, "its records are compressed, which torch.save does not do")
    if large or zeros:
        raise _corrupt(path, "its records claim more memory than they can need")


def _check_pickle(path: Path) -> None:
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        zeros = _ZEROS.search(data) is not None
    if zeros:
        raise _corrupt(path, "it asks for more memory than it can need")


def _corrupt(path: Path, reason: str) -> ValueError:
    return ValueError(f"{shown(path)} is truncated or corrupt ({shown(reason)}): download it again")


def _check_tensors(path: Path, state: "dict[str, torch.Tensor]") -> None:
    """ValueError for tensors that are larger than their file, as ones with a stride of 0 may be, and odd names."""
    if odd := [type(name).__name__ for name in state if not isinstance(name, str)]:
        raise ValueError(f"{shown(path)} names a tensor by {odd[0]}, expected text: save only the state dict")
    if nested := [name for name, tensor in state.items() if tensor.is_nested]:
        raise ValueError(f"{shown(path)} holds nested tensors, expected plain ones:{listed(nested)}")
    length = path.stat().st_size
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items() if _is_plain(tensor)}
    if large := [f"{name} {list(state[name].shape)}" for name, size in sizes.items() if size > length]:
        raise ValueError(f"{shown(path)} has {length} bytes, but larger tensors:{listed(large)}")
    if sum(sizes.values()) > _MAX_SHARING * length:
        raise ValueError(
            f"{shown(path)} has {length} bytes, but its tensors take {sum(sizes.values())}, more than sharing explains"
        )


def _is_plain(tensor: "torch.Tensor") -> bool:
    """Whether a tensor's numbers lie in memory one by one."""
    return str(tensor.layout) == "torch.strided" and tensor.device.type == "cpu" and not tensor.is_quantized


def _torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"{path} can only be read with torch: pip install 'iceformer[torch]', or get the model's safetensors",
            name="torch",
        ) from error
    return torch


def _unwrap(path: Path, content: object) -> "dict[str, torch.Tensor]":
    """The state dict that a file holds, bare or as one entry of what a trainer saved beside it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{shown(path)} holds a {type(content).__name__}, expected a state dict: names and tensors")
    if any(_is_tensor(value) for value in content.values()):
        if others := [
            f"{_named(name)} is a {type(value).__name__}" for name, value in content.items() if not _is_tensor(value)
        ]:
            raise ValueError(f"{shown(path)} holds more than tensors: {joined(others)}: save only the state dict")
        return dict(content)
    inner = {name: value for name, value in content.items() if _is_state_dict(value)}
    if len(inner) != 1:
        names, found = joined(list(map(_named, content))) or "nothing", joined(list(map(_named, inner)))
        raise ValueError(
            f"{shown(path)} holds {names}, of which {len(inner)} are state dicts{': ' if inner else ''}{found}, "
            "expected one: save the one to convert alone"
        )
    return dict(*inner.values())


def _named(key: object) -> str:
    """A key as Python writes it if that is text; whatever else could be of any length."""
    return repr(key) if isinstance(key, str) else f"a {type(key).__name__}"


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_tensor, value.values()))


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _dtype_name(tensor: "torch.Tensor") -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if _is_plain(tensor) or tensor.is_quantized:
        return name
    return f"{name} ({str(tensor.layout).removeprefix('torch.')}, {tensor.device.type})"


def _to_numpy(path: Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    """A copy, so that it outlives the file's mapping; bfloat16, which numpy lacks, goes by its bits."""
    import torch

    if not _is_plain(tensor):
        raise ValueError(f"{name} in {shown(path)} is {_dtype_name(tensor)}, expected a plain tensor")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy(), order="C").view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy(), order="C")


def _reason(error: Exception) -> str:
    """The line of torch's long messages that says what was found."""
    lines = [line.strip() for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))]
    return (found or [line for line in lines if line] or [type(error).__name__])[0].partition(". ")[0]
