"""What the readers of weight files share: what is known of a tensor before it is read, and reading a mapped file."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAPPED_BYTES = 2**26


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor; `dtype` is named as in safetensors, e.g. BF16, I64, BOOL.

    Attributes:
        stored: the tensor's name in the file, where it goes by another; else empty.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    stored: str = ""


def read_mapped(
    names: Iterable[str], open_file: Callable[[], AbstractContextManager[Callable[[str], np.ndarray]]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a memory-mapped file, which is mapped anew every 64 MiB or so.

    Pages that were read count as the process's memory for as long as they are mapped, so one mapping would hold a
    whole file beside the parameters.
    """
    left = deque(names)
    while left:
        with open_file() as get:
            mapped = 0
            while left and mapped < _MAPPED_BYTES:
                name = left.popleft()
                tensor = get(name)
                mapped += tensor.nbytes
                yield name, tensor
