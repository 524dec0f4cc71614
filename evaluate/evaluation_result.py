"""What an evaluation found, piece by piece, and its JSON file, which is written anew after every piece."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.fidelity import Fidelity, last_quarter
from ..deploy.records import read_record
from ..host.files import replacing
from .answers import Answer
from .attention_fidelity import LayerFidelity
from .benchmark_result import check_same_settings
from .configuration import REFERENCE
from .task_figures import task_figures

RESULT = "evaluation.json"


@dataclass(frozen=True)
class WindowResult:
    """The model's predictions of one window of text, by configuration.

    Attributes:
        text: name of the text.
        start: the window's first token in it.
        seconds: that the layers took for the window, in each round; with exact attention too.
        fidelity: means over stretches of the window, in their order.
        busy: share of the processors that something else used just before.
    """

    text: str
    start: int
    seconds: dict[str, tuple[float, ...]]
    fidelity: dict[str, tuple[Fidelity, ...]]
    busy: float


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's settings and what is measured so far.

    Attributes:
        settings: what was measured: checkpoint, texts, lengths, configurations.
        machine: processor and versions of packages.
        windows: the model level.
        layers: the attention level.
        answers: the task level.
        skipped: why a level was left out, by its name.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    windows: tuple[WindowResult, ...] = ()
    layers: tuple[LayerFidelity, ...] = ()
    answers: tuple[Answer, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def configurations(self) -> list[str]:
        """The names of what is compared with exact attention."""
        return [name for name in self.settings["configurations"] if name != REFERENCE]

    def overall(self, name: str) -> Fidelity:
        """Over all positions of all windows."""
        return Fidelity.merged(part for window in self.windows for part in window.fidelity[name])

    def last_quarter(self, name: str) -> Fidelity:
        """Over the last quarter of every window."""
        return Fidelity.merged(last_quarter(window.fidelity[name]) for window in self.windows)

    def by_position(self, name: str) -> tuple[Fidelity, ...]:
        """Over stretches of a window, of all windows."""
        return tuple(Fidelity.merged(parts) for parts in zip(*(w.fidelity[name] for w in self.windows), strict=True))

    def spread(self, name: str, figure: Callable[[Fidelity], float]) -> float:
        """The standard deviation of a figure from window to window, NaN of a single one."""
        values = [figure(Fidelity.merged(window.fidelity[name])) for window in self.windows]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def seconds(self, name: str) -> float:
        """Median seconds of a window, NaN before the first."""
        values = [seconds for window in self.windows for seconds in window.seconds[name]]
        return statistics.median(values) if values else math.nan

    def time_ratio(self, name: str) -> float:
        """Median seconds of a window over those of exact attention."""
        return self.seconds(name) / self.seconds(REFERENCE)

    def figures(self) -> dict[str, Any]:
        """What follows from the measurements, by configuration."""
        return {name: self._figures_of(name) for name in self.configurations} if self.windows else {}

    def _figures_of(self, name: str) -> dict[str, Any]:
        return {
            "seconds": _number(self.seconds(name)),
            "exact_seconds": _number(self.seconds(REFERENCE)),
            "time_ratio": _number(self.time_ratio(name)),
            "overall": described(self.overall(name)),
            "last_quarter": described(self.last_quarter(name)),
            "attention": self.attention_figures(name),
            "tasks": self._figures_of_tasks(name),
            "spread": {
                "loss": _number(self.spread(name, lambda fidelity: fidelity.loss)),
                "agreement": _number(self.spread(name, lambda fidelity: fidelity.agreement)),
            },
        }

    def layers_of(self, name: str) -> list[LayerFidelity]:
        """The attention level of a configuration."""
        return [layer for layer in self.layers if layer.configuration == name]

    def attention_figures(self, name: str) -> dict[str, Any] | None:
        """Means over layers, blocks and heads; None where they are not measured."""
        layers = self.layers_of(name)
        if not layers:
            return None
        figures = {
            key: float(np.mean([np.mean(getattr(layer, key)) for layer in layers]))
            for key in ("mass", "recall", "error", "keys")
        }
        return {
            **figures,
            "least_mass": float(min(np.min(layer.mass) for layer in layers)),
            "most_keys": int(max(np.max(layer.keys) for layer in layers)),
        }

    def _figures_of_tasks(self, name: str) -> dict[str, Any]:
        """By task, and whether the question was known."""
        found: dict[str, Any] = {}
        for task in dict.fromkeys(answer.task for answer in self.answers):
            for known in (True, False):
                asked = [answer for answer in self.answers if (answer.task, answer.known) == (task, known)]
                figures = task_figures(asked, name)
                if figures is not None:
                    key = "known" if known else "not_known_before"
                    found.setdefault(task, {})[key] = asdict(figures) | {"retention": _number(figures.retention)}
        return found

    def save(self, folder: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        content = {**asdict(self), "figures": self.figures()}
        with replacing(folder / RESULT) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")

    def adding(
        self,
        windows: Iterable[WindowResult] = (),
        layers: Iterable[LayerFidelity] = (),
        answers: Iterable[Answer] = (),
    ) -> "Evaluation":
        """With more of what was measured."""
        return replace(
            self,
            windows=(*self.windows, *windows),
            layers=(*self.layers, *layers),
            answers=(*self.answers, *answers),
        )


def load_evaluation(folder: Path, settings: dict[str, Any] | None = None) -> Evaluation:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is an evaluation with other settings than those given.
    """
    path = folder / RESULT
    content = json.loads(path.read_text())
    content.pop("figures", None)
    found = read_record(Evaluation, content, str(path))
    if settings is not None:
        check_same_settings(path, found.settings, settings)
    return found


def described(fidelity: Fidelity) -> dict[str, Any]:
    """A fidelity with what follows from it."""
    return {**asdict(fidelity), "loss": fidelity.loss, "perplexity_ratio": fidelity.perplexity_ratio}


def _number(value: float) -> float | None:
    """A figure that is not a number is null in JSON."""
    return value if math.isfinite(value) else None
