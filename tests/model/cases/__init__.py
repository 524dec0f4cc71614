"""Tiny configs of every architecture for the shared tests: one module per family, with `CASES` by model type."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True)
class Cases:
    """What to try of one model type.

    Attributes:
        tiny: config fields that make a model of a few thousand parameters, in transformers' names.
        options: further fields by the name of the case; together they exercise every option of the config class.
            `dtype`, `max_shard_size` and `save_original_format` say how the checkpoint is saved; `task`, of an encoder,
            for which auto class if not the last of `tasks`.
        draw: a random config from a seed.
        tasks: of an encoder, the names of transformers' auto classes to try; none for a decoder.
    """

    tiny: dict[str, Any]
    options: dict[str, dict[str, Any]]
    draw: Callable[[int], dict[str, Any]]
    tasks: tuple[str, ...] = ()


CASES: dict[str, Cases] = {
    model_type: cases
    for module in iter_modules(__path__)
    for model_type, cases in import_module(f"{__name__}.{module.name}").CASES.items()
}
DECODERS = {model_type: cases for model_type, cases in CASES.items() if not cases.tasks}
ENCODERS = {model_type: cases for model_type, cases in CASES.items() if cases.tasks}
