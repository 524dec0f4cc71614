"""Which file of a folder holds its weights, by the names alone: one file, or an index that names shards."""

import re
from collections.abc import Collection

from ..host.messages import joined

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
SINGLE_FILES = (SAFETENSORS, PICKLE)
"""Files that hold a whole model, in order of preference; the name and `.index.json` is that of the index of shards."""
_SUFFIXES = {SAFETENSORS: ("safetensors",), PICKLE: ("bin", "pt", "pth", "ckpt")}
# Variants have a word more in their names: model.fp16.safetensors, model.safetensors.index.fp16.json.
_INDEX = re.compile(r"[^/]+\.(safetensors|bin)\.index(?:\.\w+)?\.json")
_SHARD = re.compile(r"[^/]+-\d+-of-(\d+)(?:\.\w+)?\.(?:safetensors|bin)")
# What trainers leave beside the weights, and adapters.
_OTHERS = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state\w*|adapter_model)\.\w+")
_FOREIGN = ("h5", "msgpack", "npz", "onnx", "ot")


def weight_source(names: Collection[str]) -> str:
    """The file of weights, or the index of shards, among the names of a folder's files.

    Taken is the first of model.safetensors, its index, pytorch_model.bin and its index; else the only safetensors file
    or index with another name; else the only one of torch's.

    Raises:
        FileNotFoundError: there is none, or no only one; the message is to follow the folder's name.
    """
    for single in SINGLE_FILES:
        for name in (single, f"{single}.index.json"):
            if name in names:
                return name
    for single, suffixes in _SUFFIXES.items():
        sources, shards = _sources(names, suffixes)
        if shards and not sources:
            raise FileNotFoundError(
                f"has {', '.join(shards)}, but not {single}.index.json, the index of them: download the index too"
            )
        if len(sources) > 1:
            raise FileNotFoundError(
                f"has {', '.join(sources)}, expected one file, {single}, or {single}.index.json with its shards: "
                "download the index too, or keep the one to convert"
            )
        if sources:
            return sources[0]
    expected = f"expected {SAFETENSORS} or {PICKLE}, or the index of either with its shards"
    if files := sorted(name for name in names if name.endswith(".gguf")):
        raise FileNotFoundError(
            f"has its weights only in {joined(files)}: fetch the one to convert, and give that file"
        )
    if foreign := sorted(name for name in names if name.rpartition(".")[2] in _FOREIGN):
        raise FileNotFoundError(f"has its weights only in {', '.join(foreign)}, {expected}: download those")
    raise FileNotFoundError(f"has no weights, {expected}")


def holds_weights(names: Collection[str]) -> bool:
    """Whether any of a folder's files is one of weights, whole or not, by its name."""
    suffixes = {suffix for group in _SUFFIXES.values() for suffix in group}
    return any(name.rpartition(".")[2] in suffixes and not _OTHERS.fullmatch(name) for name in names)


def is_index(name: str) -> bool:
    """Whether a file is the index of a sharded checkpoint, by its name."""
    return _INDEX.fullmatch(name) is not None


def index_suffix(name: str) -> str:
    """The suffix of the shards that an index names, with the dot."""
    match = _INDEX.fullmatch(name)
    return f".{match[1]}" if match else ""


def _sources(names: Collection[str], suffixes: Collection[str]) -> tuple[list[str], list[str]]:
    """The files that may hold a whole model and the indexes, and the shards, with one of the suffixes."""
    sources, shards = [], []
    for name in sorted(names):
        shard = _SHARD.fullmatch(name)
        if is_index(name):
            if index_suffix(name)[1:] in suffixes:
                sources.append(name)
        elif name.rpartition(".")[2] in suffixes and not _OTHERS.fullmatch(name):
            # The only shard of one is a whole model.
            (shards if shard and int(shard[1]) > 1 else sources).append(name)
    return sources, shards
