"""Reading a safetensors file, without torch: the header on opening, tensors one at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..host.messages import shown
from .readable import check_readable
from .tensor_file import TensorInfo, read_mapped


@dataclass(frozen=True)
class SafetensorsFile:
    """One `*.safetensors`."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]:
        """What the header says, by name; ValueError if the file is truncated or corrupt."""
        tensors = {}
        with self._open() as opened:
            for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                view = opened.get_slice(name)
                tensors[name] = TensorInfo(self.path, tuple(view.get_shape()), view.get_dtype())
        return tensors

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once; ValueError if the file is no longer readable."""
        return read_mapped(self.infos(), self._getter)

    def read_one(self, name: str) -> np.ndarray:
        """One tensor; ValueError if the file is no longer readable."""
        with self._getter() as get:
            return get(name)

    @contextmanager
    def _getter(self) -> Iterator[Callable[[str], np.ndarray]]:
        with self._open() as opened:
            yield opened.get_tensor

    def _open(self) -> Any:
        check_readable(self.path)
        try:
            return safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{shown(self.path)} is truncated or corrupt ({shown(error)}): download it again"
            ) from error
