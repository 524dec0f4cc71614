"""Lazy reading of a Hugging Face folder's weights, in one file or in shards; safetensors without torch.

Opening reads names, shapes and dtypes only; `read` gives tensors one at a time.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..host.messages import listed
from .json_file import read_json
from .safetensors_reader import SafetensorsFile
from .tensor_file import TensorInfo
from .torch_reader import TorchFile
from .weight_files import index_suffix, is_index, weight_source

DTYPES = ("BF16", "F16", "F32", "F64")
"""Of tensors that fill parameters; F64 is narrowed to F32."""
# Names and dtypes by which weights are known as quantised, whatever the config says.
_QUANTIZED_NAMES = {
    "GPTQ or AWQ": r".*\.(?:qweight|qzeros)",
    "bitsandbytes": r".*\.(?:SCB|weight\.(?:absmax|quant_map|quant_state\..*))",
    "compressed-tensors": r".*\.weight_packed",
    "MXFP4": r".*proj_blocks",
    "MLX": r".*\.biases",
}
# Modules of torch that hold a model, or a part of one, and show in the names: of data parallelism, of torch.compile, of
# sharded data parallelism and of activation checkpoints. No model has parts of these names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_QUANTIZED_DTYPES = re.compile(r"F8_\w+|F6_\w+|F4|I4|U4|q\w+|u?int[1-7]|float[48]_\w+")


@dataclass(frozen=True)
class Weights:
    """The weights of a folder.

    Attributes:
        files: the files that hold them, in order.
        tensors: what they hold, by name; names are without the words that wrappers put in.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once, file by file.

        Raises:
            ValueError: a file is no longer readable.
        """
        for file in self.files:
            names = {info.stored: name for name, info in self.tensors.items() if info.stored and info.file == file}
            for stored, tensor in open_file(file).read():
                yield names.get(stored, stored), tensor

    def read_one(self, name: str) -> np.ndarray:
        """One tensor by name; ValueError if its file is no longer readable."""
        info = self.tensors[name]
        return open_file(info.file).read_one(info.stored or name)


def open_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder: names, shapes and dtypes, no data yet. `weight_source` chooses the files.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ModuleNotFoundError: the weights are pickled, and torch is not installed.
        ValueError: a file is truncated or corrupt, an index does not fit its shards, or the weights are quantised.
    """
    files, weight_map = _find(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names: download what is missing")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in open_file(file).infos().items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].file.name} and in {file.name} of {folder}")
            tensors[name] = info
    _check_index(folder, weight_map, tensors)
    _refuse_quantized(folder, tensors)
    return Weights(tuple(files), _without_wrappers(folder, tensors))


def check_dtypes(weights: Weights, names: Iterable[str]) -> None:
    """ValueError that lists those of the named tensors which are not float32, float16 or bfloat16."""
    wrong = [
        f"{name} is {info.dtype}, in {info.file.name}"
        for name in names
        if (info := weights.tensors[name]).dtype not in DTYPES
    ]
    if wrong:
        raise ValueError(f"parameters are read from {', '.join(DTYPES)} only, but:{listed(sorted(wrong))}")


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not the index of a sharded checkpoint, or points out of its folder.
    """
    return sorted(set(_weight_map(index).values()))


def open_file(path: Path) -> SafetensorsFile | TorchFile:
    """The reader of one file of weights, by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _find(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of the weights, and where their index, if they have one, places each tensor."""
    try:
        source = folder / weight_source({file.name for file in folder.iterdir() if file.is_file()})
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} {error}") from None
    if not is_index(source.name):
        return [source], {}
    return [folder / shard for shard in shard_names(source)], _weight_map(source)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    suffix = index_suffix(index.name)
    for name, file in weight_map.items():
        # A plain name, so that an index cannot point out of its folder.
        if not isinstance(file, str) or not re.fullmatch(rf"[^/\\:\0]+{re.escape(suffix)}", file):
            raise ValueError(f"{index} places {name} in {file!r}, expected the name of a {suffix} file in its folder")
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = [
        f"{name} in {file}"
        for name, file in sorted(weight_map.items())
        if name not in tensors or tensors[name].file.name != file
    ]
    if absent:
        raise ValueError(f"{folder}: the index names the wrong files for these tensors:{listed(absent)}")


def _without_wrappers(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names that they have in the model itself, without those of what it was wrapped in."""
    plain: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        name = _WRAPPERS.sub("", stored)
        if name in plain:
            raise ValueError(f"{folder} holds {name} twice: as {plain[name].stored or name} and as {stored}")
        plain[name] = info if name == stored else replace(info, stored=stored)
    return plain


def _refuse_quantized(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    for name, info in sorted(tensors.items()):
        method = next((method for method, names in _QUANTIZED_NAMES.items() if re.fullmatch(names, name)), None)
        if method or _QUANTIZED_DTYPES.fullmatch(info.dtype):
            raise ValueError(
                f"{folder} holds quantised weights ({f'{method}: ' if method else ''}{name} is {info.dtype}), expected "
                f"{', '.join(DTYPES)}: convert the model that this one was quantised from"
            )
