"""Lazy reading of a Hugging Face folder's weights, in one file or in shards; safetensors without torch.

Opening reads names, shapes and dtypes only; `read` gives tensors one at a time.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .json_file import read_json
from .problems import listed
from .safetensors_reader import SafetensorsFile
from .tensor_file import TensorInfo
from .torch_reader import TorchFile

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
SINGLE_FILES = (SAFETENSORS, PICKLE)
"""Files that hold a whole model, in order of preference; the name and `.index.json` is that of the index of shards."""
DTYPES = ("BF16", "F16", "F32")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# What trainers leave beside the weights.
_TRAINING = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state\w*|adapter_model)\.\w+")
_FOREIGN = ("*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx", "*.ot")
# Names and dtypes by which weights are known as quantised, whatever the config says.
_QUANTIZED_NAMES = {
    "GPTQ or AWQ": r".*\.(?:qweight|qzeros)",
    "bitsandbytes": r".*\.(?:SCB|weight\.(?:absmax|quant_map|quant_state\..*))",
    "compressed-tensors": r".*\.weight_packed",
    "MXFP4": r".*proj_blocks",
}
_QUANTIZED_DTYPES = re.compile(r"F8_\w+|F6_\w+|F4|I4|U4|q\w+|u?int[1-7]|float[48]_\w+")


@dataclass(frozen=True)
class Weights:
    """The weights of a folder.

    Attributes:
        files: the files that hold them, in order.
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
            yield from open_file(file).read()

    def read_one(self, name: str) -> np.ndarray:
        """One tensor by name; ValueError if its file is no longer readable."""
        return open_file(self.tensors[name].file).read_one(name)


def open_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder: names, shapes and dtypes, no data yet.

    Taken is the first of model.safetensors, its shards, pytorch_model.bin, its shards, and a lone file of torch's with
    another name.

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
    return Weights(tuple(files), tensors)


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
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name], {}
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in shard_names(index)], _weight_map(index)
    pickles = [file for file in sorted(folder.iterdir()) if _may_hold_a_model(file)]
    if any(folder.glob("*.safetensors")) or len(pickles) != 1:
        raise FileNotFoundError(_nothing_to_read(folder, pickles))
    return pickles, {}


def _may_hold_a_model(file: Path) -> bool:
    return file.is_file() and file.suffix in _PICKLE_SUFFIXES and not _TRAINING.fullmatch(file.name)


def _nothing_to_read(folder: Path, pickles: list[Path]) -> str:
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"{folder} has {', '.join(others)}, but neither {SAFETENSORS} nor {SAFETENSORS}.index.json: "
            "download the index too"
        )
    if pickles:
        return (
            f"{folder} has {', '.join(file.name for file in pickles)}, expected one file, {PICKLE}, or "
            f"{PICKLE}.index.json with its shards: download the index too, or keep the one to convert"
        )
    expected = f"expected {SAFETENSORS} or {PICKLE}, or the index of either with its shards"
    if foreign := sorted(path.name for pattern in _FOREIGN for path in folder.glob(pattern)):
        return f"{folder} has its weights only in {', '.join(foreign)}, {expected}: download those"
    return f"{folder} has no weights, {expected}"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
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
        raise ValueError(f"{folder}: the index places tensors where they are not:{listed(absent)}")


def _refuse_quantized(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    for name, info in sorted(tensors.items()):
        method = next((method for method, names in _QUANTIZED_NAMES.items() if re.fullmatch(names, name)), None)
        if method or _QUANTIZED_DTYPES.fullmatch(info.dtype):
            raise ValueError(
                f"{folder} holds quantised weights ({f'{method}: ' if method else ''}{name} is {info.dtype}), expected "
                f"{', '.join(DTYPES)}: convert the model that this one was quantised from"
            )
