"""Building and spoiling Hugging Face folders: tiny random models of every type, and changes to their files."""

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import iceformer

from ..model.cases import CASES
from ..model.reference import save_random

WEIGHTS = "model.safetensors"


def tiny(folder: Path, model_type: str, *, auto_class: Any = None, **fields: Any) -> PreTrainedModel:
    """Saves the tiny random model of a type in `folder`, with further config fields; returns it as torch's.

    `auto_class` is transformers' `AutoModel` for encoders and `AutoModelForCausalLM` for decoders if not given.
    """
    cases = CASES[model_type]
    auto_class = auto_class or (AutoModel if cases.tasks else AutoModelForCausalLM)
    return save_random(folder, model_type, auto_class=auto_class, **{**cases.tiny, **fields})


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **fields: object) -> None:
    """Sets fields of the object in a JSON file, which is made if there is none."""
    write_json(file, {**(read_json(file) if file.exists() else {}), **fields})


def drop_fields(file: Path, *names: str) -> None:
    """Removes fields of the object in a JSON file, those that it has."""
    write_json(file, {name: value for name, value in read_json(file).items() if name not in names})


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder with one safetensors file, by name."""
    return load_file(folder / WEIGHTS)


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], name: str = WEIGHTS) -> None:
    """Writes one safetensors file."""
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)


def edit_tensors(folder: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Sets tensors by name; None removes one."""
    changed = {**tensors_of(folder), **changes}
    write_tensors(folder, {name: value for name, value in changed.items() if value is not None})


def rename_tensors(folder: Path, prefix: str) -> None:
    """Puts a prefix in front of every tensor's name."""
    write_tensors(folder, {prefix + name: value for name, value in tensors_of(folder).items()})


def refused(source: Path, error: type[Exception] = ValueError, **options: Any) -> str:
    """The message with which converting `source` fails, after a look that nothing is left of the attempt."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error) as caught:
        iceformer.convert_checkpoint(source, source.parent / "new" / "checkpoint", **options)
    assert sorted(source.parent.iterdir()) == before
    return str(caught.value)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Holds this thread, and those that it starts, to the permissions of files, as root is not otherwise."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # linux/capability.h: _LINUX_CAPABILITY_VERSION_3, this thread
    held = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable

    def apply(call: Any, sets: Any) -> None:
        if call(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "capabilities")

    apply(libc.capget, held)
    lowered = (ctypes.c_uint32 * 6)(*held)
    lowered[0] &= ~0b1111  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    apply(libc.capset, lowered)
    try:
        yield
    finally:
        apply(libc.capset, held)
