"""A GGUF model, in one file or split: its metadata, and its tensors under the names that Hugging Face gives them."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...host.messages import listed
from ..reader import Weights
from ..tensor_file import TensorInfo, read_mapped
from ..weight_files import holds_weights
from .header import Header, StoredTensor, read_header
from .names import Piece
from .types import DTYPES, PLAIN, is_readable, need_gguf, to_numbers, type_name

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufWeights(Weights):
    """The tensors of a GGUF model under Hugging Face's names, laid out as there.

    Attributes:
        stored: where the file has its tensors, by its own names.
        pieces: what of them each tensor is.
        dtype: of those that are quantised.
    """

    stored: Mapping[str, StoredTensor]
    pieces: Mapping[str, Piece]
    dtype: str

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once, in the order of the files."""
        return read_mapped(self.pieces, self._getter)

    def read_one(self, name: str) -> np.ndarray:
        """One tensor by name."""
        return read_piece(self.stored, self.pieces[name], self.dtype)

    @contextmanager
    def _getter(self) -> Iterator[Callable[[str], np.ndarray]]:
        yield self.read_one


def open_header(path: Path) -> Header:
    """The header of a GGUF model; that of a split one has the tensors of all its files.

    Raises:
        FileNotFoundError: no such file, or one of a split model is missing.
        ModuleNotFoundError: the `gguf` package is not installed.
        ValueError: a file is no GGUF file, damaged, or not part of what the others are.
    """
    need_gguf(path)
    header = read_header(path)
    if header.metadata.get("split.count", 1) in (0, 1):
        return header
    return _joined(path)


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that a path stands for: itself, or the one in a folder without other weights.

    Of the files of a split model it is the first; what sees images, beside a language model (`mmproj`), does not count.

    Raises:
        ValueError: the folder has several.
    """
    if source.is_file():
        return source if source.suffix == ".gguf" or _begins_as_gguf(source) else None
    if not source.is_dir():
        return None
    if holds_weights([path.name for path in source.iterdir()]):
        return None
    found = [path for path in sorted(source.glob("*.gguf")) if not path.name.lower().startswith("mmproj")]
    firsts = [path for path in found if (match := _SPLIT.fullmatch(path.name)) is None or int(match["number"]) == 1]
    found = firsts or found[:1]
    if len(found) > 1:
        raise ValueError(f"{source} has several GGUF files, give the one to convert:{listed(list(map(str, found)))}")
    return found[0] if found else None


def make_weights(header: Header, pieces: Mapping[str, Piece], dtype: str) -> GgufWeights:
    """The tensors of a model by the names of `pieces`; `dtype` is what quantised ones become.

    Raises:
        ValueError: an unknown dtype, or tensors of a type whose numbers are not known.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of: {', '.join(DTYPES)}")
    unreadable = [
        f"{name} is {type_name(tensor.type)}"
        for name, tensor in sorted(header.tensors.items())
        if not is_readable(tensor.type)
    ]
    if unreadable:
        raise ValueError(f"{header.path} has tensors of types that the `gguf` package cannot read:{listed(unreadable)}")
    tensors = {name: _info(header.tensors[piece.source], piece, dtype) for name, piece in pieces.items()}
    files = tuple(dict.fromkeys(tensor.file for tensor in header.tensors.values()))
    return GgufWeights(files, tensors, header.tensors, pieces, dtype)


def read_piece(stored: Mapping[str, StoredTensor], piece: Piece, dtype: str = "float32") -> np.ndarray:
    """What a piece is of the file's tensors, in memory."""
    tensor = stored[piece.source]
    row_bytes = tensor.size // np.prod(tensor.shape[:-1], dtype=int)
    mapped = np.memmap(tensor.file, np.uint8, "r", tensor.start, (*tensor.shape[:-1], int(row_bytes)))
    return piece.change(to_numbers(np.asarray(mapped[piece.index]), tensor.type, dtype))


def _info(tensor: StoredTensor, piece: Piece, dtype: str) -> TensorInfo:
    # A view without data, which is only indexed.
    shape = np.broadcast_to(np.uint8(0), tensor.shape)[piece.index].shape
    name = PLAIN[tensor.type][0] if tensor.type in PLAIN else DTYPES[dtype]
    return TensorInfo(tensor.file, shape[::-1] if piece.transposed else shape, name)


def _joined(path: Path) -> Header:
    """The header of a split model, of which `path` is one file."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"{path} is one file of a split model, expected a name such as NAME-00001-of-00003.gguf: restore its "
            "name, and put the other files next to it"
        )
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [other.name for other in paths if not other.is_file()]:
        raise FileNotFoundError(f"{path} is one file of a split model, which lacks:{listed(missing)}")
    headers = [read_header(other) for other in paths]
    tensors: dict[str, StoredTensor] = {}
    for number, header in enumerate(headers):
        if header.metadata.get("split.no") != number or header.metadata.get("split.count") != count:
            raise ValueError(
                f"{header.path} says that it is file {header.metadata.get('split.no')!r}, counted from 0, of "
                f"{header.metadata.get('split.count')!r}, expected {number} of {count}: download it again"
            )
        if twice := sorted(tensors.keys() & header.tensors.keys()):
            raise ValueError(f"{header.path} has tensors that earlier files have too:{listed(twice)}")
        tensors |= header.tensors
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(f"{path}: the files of the split model have {len(tensors)} tensors, expected {expected}")
    return replace(headers[0], tensors=tensors)


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(4) == b"GGUF"
