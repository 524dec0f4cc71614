"""Lazy reading of a Hugging Face folder's safetensors, in one file or in shards, without torch.

Opening reads headers only; `read` gives tensors one at a time, memory-mapped file by file.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """The weights of a folder.

    Attributes:
        files: the safetensors files, in order.
        tensors: what they hold, by name.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once, file by file.

        Raises:
            ValueError: a file is no longer readable.
        """
        for file in self.files:
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                    yield name, opened.get_tensor(name)

    def read_one(self, name: str) -> np.ndarray:
        """One tensor by name; ValueError if its file is no longer readable."""
        with _open(self.tensors[name].file) as opened:
            return opened.get_tensor(name)


def parse_json(path: Path) -> Any:
    """What a JSON file holds; FileNotFoundError if there is none, ValueError if it is not JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def open_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder, from the headers of its safetensors files.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a file is truncated or corrupt, an index does not fit its shards, or a dtype is not supported.
    """
    weight_map: dict[str, str] = {}
    if (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        weight_map = _weight_map(folder / INDEX_FILE)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        raise FileNotFoundError(_nothing_to_read(folder))
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names: download what is missing")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(file).items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].file.name} and in {file.name} of {folder}")
            tensors[name] = info
    _check_dtypes(folder, tensors)
    _check_index(folder, weight_map, tensors)
    return Weights(tuple(files), tensors)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    for name, file in weight_map.items():
        # A plain name, so that an index cannot point out of its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
            raise ValueError(
                f"{index} places {name} in {file!r}, expected the name of a .safetensors file in its folder"
            )
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} has its weights only in {', '.join(pickles)}, and only safetensors are read: load the model "
            "with transformers and save it again with save_pretrained, which writes them"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder} has {', '.join(others)}, but neither {SINGLE_FILE} nor {INDEX_FILE}: download the index too"
    return f"{folder} has no weights, expected {SINGLE_FILE}, or {INDEX_FILE} with its shards"


def _read_header(file: Path) -> dict[str, TensorInfo]:
    tensors = {}
    with _open(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
            view = opened.get_slice(name)
            tensors[name] = TensorInfo(file, tuple(view.get_shape()), view.get_dtype())
    return tensors


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): download it again") from error


def _check_dtypes(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    if wrong := [f"{name} is {info.dtype}" for name, info in tensors.items() if info.dtype not in DTYPES]:
        raise ValueError(f"{folder}: only {', '.join(DTYPES)} tensors are read, but:\n  " + "\n  ".join(sorted(wrong)))


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = [
        f"{name} in {file}"
        for name, file in sorted(weight_map.items())
        if name not in tensors or tensors[name].file.name != file
    ]
    if absent:
        raise ValueError(f"{folder}: the index places tensors where they are not:\n  " + "\n  ".join(absent))
