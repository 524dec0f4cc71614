"""A checkpoint under evaluation: its models, its constants and its tokenizer, each made when it is first needed."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from ..convert.checkpoint import CONFIG, load_model
from ..deploy.artifact import TOKENIZER
from ..deploy.calibrated_rounding import round_model, rounding_text
from ..deploy.calibration import CalibrationInputs, calibrate, calibration_inputs, read_tokenizer
from ..deploy.compile import DTYPES
from ..deploy.fidelity import BINS
from ..deploy.reader import TAIL, Reader
from ..deploy.text_windows import Text, Window, leading_tokens, windows_of
from ..deploy.tokenization import TextTokenizer
from ..model.decoder import CausalLM
from ..model.self_attention import LayerConstants
from .configuration import Configuration
from .tasks import TASKS
from .texts import read_ids

_CHUNK = 2048
_LEAST_TOKENS = 2 * BINS


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, besides the texts and the configurations.

    Attributes:
        tokens: Number of tokens of a window of text.
        windows: Number of windows, spread over the texts.
        dtype: Number format of weights, activations and KV cache, of exact attention too: float32 or bfloat16.
        blocks: Number of query blocks at which attention itself is measured, in the first window of each text; 0 for
            none.
        tasks: Names of the tasks.
        lengths: Tokens of a task's prompts; empty chooses half of `tokens`, and all of them, as far as they are enough.
        depths: Number of places in a context that are asked about.
        samples: Number of contexts of each task and length.
        seed: Of the tasks.
    """

    tokens: int = 8192
    windows: int = 4
    dtype: str = "float32"
    blocks: int = 4
    tasks: tuple[str, ...] = ("passkey", "needle")
    lengths: tuple[int, ...] = ()
    depths: int = 5
    samples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of: {', '.join(DTYPES)}")
        if self.tokens < _LEAST_TOKENS:
            raise ValueError(f"tokens is {self.tokens}, expected at least {_LEAST_TOKENS}")
        if self.windows < 1 or self.blocks < 0:
            raise ValueError(f"windows is {self.windows} and blocks {self.blocks}, expected at least 1 and at least 0")
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"task is {name!r}, expected one of: {', '.join(TASKS)}")
        if self.depths < 1 or self.samples < 1:
            raise ValueError(f"depths is {self.depths} and samples {self.samples}, expected at least 1 each")
        if not self.lengths:
            enough = [length for length in (self.tokens // 2, self.tokens) if length >= 2 * TAIL]
            object.__setattr__(self, "lengths", tuple(enough))
        for length in self.lengths:
            if not 2 * TAIL <= length <= self.tokens:
                raise ValueError(
                    f"a task's prompts have {length} tokens, expected {2 * TAIL} to {self.tokens}, those of a window"
                )

    @property
    def chunk(self) -> int:
        """Tokens of one call."""
        return min(_CHUNK, self.tokens)

    @property
    def capacity(self) -> int:
        """Tokens that a KV cache has room for."""
        return -(-self.tokens // self.chunk) * self.chunk


class Bench:
    """A checkpoint with its configurations: models, constants and readers, each made when it is first needed.

    Attributes:
        configurations: by name, the reference first.
        options: as given.
        settings: what an evaluation is known by.
    """

    def __init__(
        self,
        checkpoint: Path,
        configurations: Mapping[str, Configuration],
        options: Options,
        calibration: str | Path | ArrayLike | None,
    ) -> None:
        self.configurations, self.options = configurations, options
        self._checkpoint, self._calibration = checkpoint, calibration
        model = load_model(checkpoint, dtype=options.dtype)
        if not isinstance(model, CausalLM) or model.config.kind != "decoder":
            task = getattr(model.config, "task", "")
            raise ValueError(f"{checkpoint} is a model for {task}, expected a decoder that predicts the next token")
        limit = model.config.max_tokens
        if limit is not None and options.tokens > limit:
            raise ValueError(f"tokens is {options.tokens}, but the model was trained for at most {limit} positions")
        self._models: dict[tuple[str, str], CausalLM] = {(form, "same"): model for form in ("same", options.dtype)}
        self._constants: dict[object, LayerConstants] = {}
        self._readers: dict[str, Reader] = {}
        self._texts: list[Text] = []

    @property
    def model(self) -> CausalLM:
        """With the checkpoint's own weights."""
        return self._models["same", "same"]

    @cached_property
    def _calibration_row(self) -> CalibrationInputs:
        return calibration_inputs(self.model, self._calibration, self._checkpoint / TOKENIZER)

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The checkpoint's tokenizer, or None."""
        file = self._checkpoint / TOKENIZER
        return read_tokenizer(file, self.model.config.vocab_size) if file.exists() else None

    def windows(self, files: Sequence[Path]) -> list[Window]:
        """The windows of the texts."""
        if not files:
            raise ValueError("texts is empty, expected at least one file")
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise ValueError(f"texts are {', '.join(names)}, expected files of different names")
        self._texts = [read_ids(file, self.tokenizer, self.model.config.vocab_size) for file in files]
        return windows_of(self._texts, self.options.tokens, self.options.windows, leading_tokens(self.tokenizer))

    def filler(self, tokens: int) -> str:
        """Ordinary text of about so many tokens, from the middle of the first text."""
        assert self.tokenizer is not None
        ids = self._texts[0].ids
        start = max(0, (ids.size - tokens) // 2)
        return self.tokenizer.decode(ids[start : start + tokens].tolist())

    @property
    def settings(self) -> dict[str, Any]:
        """What an evaluation is known by; texts are known once they were read."""
        settings = {
            "checkpoint": self._checkpoint.resolve().name,
            "fingerprint": _fingerprint(self._checkpoint),
            "texts": {text.name: text.sha256 for text in self._texts},
            "threads": len(os.sched_getaffinity(0)),
            **asdict(self.options),
            "calibration": self._calibration_row.info.sha256,
            "configurations": {name: each.to_dict() for name, each in self.configurations.items()},
        }
        return json.loads(json.dumps(settings))  # as the result's file has them

    def model_of(self, name: str) -> CausalLM:
        """With the weights of a configuration."""
        configuration = self.configurations[name]
        formats = configuration.weights, configuration.activations
        if formats not in self._models:
            self._models[formats] = self._rounded(*formats)
        return self._models[formats]

    def _rounded(self, weights: str, activations: str) -> CausalLM:
        text = rounding_text(self.model, weights, self._calibration, self._checkpoint / TOKENIZER)
        return round_model(self.model, weights, text, lambda _: None, activations).model

    def constants(self, name: str) -> LayerConstants | None:
        """What the attention of a configuration is calibrated to; None if it needs nothing."""
        attention = self.configurations[name].attention
        if not attention.calibrated:
            return None
        if attention.rule not in self._constants:
            row = self._calibration_row
            self._constants[attention.rule] = calibrate(
                self.model, [attention], row.inputs, row.tokens, longest=self.options.capacity
            )
        return self._constants[attention.rule]

    def reader(self, name: str) -> Reader:
        """The reader in a configuration."""
        if name not in self._readers:
            configuration = self.configurations[name]
            self._readers[name] = Reader(
                self.model_of(name),
                configuration.attention,
                self.constants(name),
                capacity=self.options.capacity,
                chunk=self.options.chunk,
                kv_dtype=self.options.dtype if configuration.kv_dtype == "same" else configuration.kv_dtype,
            )
        return self._readers[name]


def _fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the config and of the digests of the weights."""
    digest = hashlib.sha256((checkpoint / CONFIG).read_bytes())
    weights = checkpoint / "params.sha256"
    digest.update(weights.read_bytes() if weights.exists() else b"")
    return digest.hexdigest()
