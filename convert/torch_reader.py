"""Reading a file that `torch.save` wrote, with the `torch` extra: tensors only, code that it carries is never run.

Files in torch's zip format are mapped, and hold no memory beside the tensor that is read. Those of torch before 1.6
cannot be mapped: they are read whole.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .tensor_file import TensorInfo, read_mapped

if TYPE_CHECKING:
    import torch

_ZIP, _PICKLE = b"PK", b"\x80"
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
                yield name, _to_numpy(state.pop(name))

    def read_one(self, name: str) -> np.ndarray:
        """One tensor; ValueError if the file is no longer readable."""
        with self._getter() as get:
            return get(name)

    @contextmanager
    def _getter(self) -> Iterator[Callable[[str], np.ndarray]]:
        state = self._state_dict()
        try:
            yield lambda name: _to_numpy(state[name])
        finally:
            state.clear()

    def _is_zip(self) -> bool:
        with self.path.open("rb") as opened:
            start = opened.read(2)
        if not start.startswith((_ZIP, _PICKLE)):
            raise ValueError(f"{self.path} is truncated or corrupt (torch.save did not write it): download it again")
        return start == _ZIP

    def _state_dict(self) -> "dict[str, torch.Tensor]":
        torch, mapped = _torch(self.path), self._is_zip()
        try:
            with warnings.catch_warnings(action="ignore"):  # of old pickle protocols
                content = torch.load(self.path, weights_only=True, mmap=mapped, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} holds more than tensors ({_reason(error)}), and what else a pickle holds can run code: "
                "it was not opened; save the model's state_dict() alone, or as safetensors"
            ) from error
        except Exception as error:
            # torch's readers raise errors of many kinds for files that are damaged.
            raise ValueError(f"{self.path} is truncated or corrupt ({_reason(error)}): download it again") from error
        return _unwrap(self.path, content)


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
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict: names and tensors")
    if any(_is_tensor(value) for value in content.values()):
        if others := [
            f"{name} is a {type(value).__name__}" for name, value in content.items() if not _is_tensor(value)
        ]:
            raise ValueError(f"{path} holds more than tensors: {', '.join(others)}: save the state dict alone")
        return dict(content)
    inner = {name: value for name, value in content.items() if _is_state_dict(value)}
    if len(inner) != 1:
        raise ValueError(
            f"{path} holds {', '.join(map(repr, content)) or 'nothing'}, of which {len(inner)} are state dicts"
            f"{': ' if inner else ''}{', '.join(map(repr, inner))}, expected one: save the one to convert alone"
        )
    return dict(*inner.values())


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_tensor, value.values()))


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _dtype_name(tensor: "torch.Tensor") -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    layout = str(tensor.layout).removeprefix("torch.")
    return _DTYPES.get(name, name) if layout == "strided" else f"{_DTYPES.get(name, name)} ({layout})"


def _to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """A copy, so that it outlives the file's mapping; bfloat16, which numpy lacks, goes by its bits."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy(), order="C").view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy(), order="C")


def _reason(error: Exception) -> str:
    """The line of torch's long messages that says what was found."""
    lines = [line.strip() for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))]
    return (found or [line for line in lines if line] or [type(error).__name__])[0].partition(". ")[0]
