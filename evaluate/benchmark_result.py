"""A benchmark's result: settings, timings and retention, the figures that follow from them, and its JSON file."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .benchmark_retention import Retention
from .processes import Timing

TOLERANCE = {"float32": 0.01, "bfloat16": 0.25}
"""How far an engine's output may be from that of `exact`, in standard deviations, to be called the same."""
_OTHERWISE = ("two_stage", "floor")
"""Engines that are meant to compute something else than `exact`."""


@dataclass
class Benchmark:
    """A run's settings and timings, as they stand in its JSON file.

    Attributes:
        settings: what was measured: shape or model, dtype, threads, attention, rounds.
        machine: processor, its features, and versions of packages.
        gemm_flops: the machine's measured peak of a matrix product in the dtype, floating-point operations a second.
        dense_flops_per_token: operations of the model's linear layers; 0 where attention alone is measured.
        timings: one for each engine and length.
        retention: what the timed attention keeps of a model's answers, or why that is not known.
        read_bandwidth: the machine's measured peak of reading memory, bytes a second.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    gemm_flops: float
    dense_flops_per_token: int
    timings: list[Timing] = field(default_factory=list)
    retention: Retention = field(default_factory=Retention)
    read_bandwidth: float = 0.0

    @property
    def lengths(self) -> list[int]:
        """The lengths that were measured, rising."""
        return sorted({timing.length for timing in self.timings})

    @property
    def engines(self) -> list[str]:
        """The engines that were measured, in the order in which they were asked for."""
        return list(dict.fromkeys(timing.engine for timing in self.timings))

    def median(self, engine: str, length: int) -> float:
        """Median seconds of an engine at a length, NaN if it was not measured."""
        found = (timing.median for timing in self.timings if (timing.engine, timing.length) == (engine, length))
        return next(found, math.nan)

    def ratio(self, engine: str, base: str, length: int) -> float:
        """Seconds of an engine as a multiple of those of another, NaN if one was not measured."""
        return self.median(engine, length) / self.median(base, length)

    def floor_share_of_peak(self, length: int) -> float:
        """What the dense layers reach of the machine's peak when attention is left out."""
        return self.dense_flops_per_token * length / self.median("floor", length) / self.gemm_flops

    def growth(self, engine: str, shorter: int, longer: int) -> float:
        """The exponent p of seconds ~ length^p between two lengths."""
        return math.log(self.median(engine, longer) / self.median(engine, shorter)) / math.log(longer / shorter)

    def agrees(self, timing: Timing) -> bool | None:
        """Whether an engine computes what `exact` does; None if it is not meant to, or was not compared."""
        if timing.engine in _OTHERWISE or timing.difference is None:
            return None
        return timing.difference <= TOLERANCE[self.settings["dtype"]]

    def replace_length(self, length: int, timings: Sequence[Timing]) -> None:
        """Puts timings in place of those of a length."""
        self.timings = [timing for timing in self.timings if timing.length != length] + list(timings)

    def share_of_bandwidth(self, timing: Timing) -> float:
        """What an engine that decodes reads of what the machine can, NaN if its bytes are not known."""
        if not timing.token_bytes or not self.read_bandwidth:
            return math.nan
        return timing.token_bytes / timing.median / self.read_bandwidth

    def figures(self) -> dict[str, Any]:
        """What follows from the timings, by mode: tokens a second, ratios, shares of the machine's peaks, growth."""
        return _finite(self._decode_figures() if self.settings["mode"] == "decode" else self._prompt_figures())

    def _decode_figures(self) -> dict[str, Any]:
        """By depth and engine."""
        return {
            "depths": {
                str(length): {
                    timing.engine: {
                        "seconds_per_token": timing.median,
                        "tokens_per_second": self.settings["batch"] / timing.median,
                        "bytes_per_token": timing.token_bytes or None,
                        "share_of_bandwidth": self.share_of_bandwidth(timing),
                        "ratio_to_exact": self.ratio(timing.engine, "exact", length),
                    }
                    for timing in self.timings
                    if timing.length == length
                }
                for length in self.lengths
            }
        }

    def _prompt_figures(self) -> dict[str, Any]:
        """By length, and from length to length."""
        lengths = {
            str(length): {
                "seconds": {engine: self.median(engine, length) for engine in self.engines},
                "tokens_per_second": {engine: length / self.median(engine, length) for engine in self.engines},
                "ratio_to_two_stage": {engine: self.ratio(engine, "two_stage", length) for engine in self.engines},
                "ratio_to_exact": {engine: self.ratio(engine, "exact", length) for engine in self.engines},
                "ratio_to_floor": {engine: self.ratio(engine, "floor", length) for engine in self.engines},
                "floor_share_of_peak": self.floor_share_of_peak(length),
            }
            for length in self.lengths
        }
        growth = {
            f"{shorter}-{longer}": {engine: self.growth(engine, shorter, longer) for engine in self.engines}
            for shorter, longer in itertools.pairwise(self.lengths)
        }
        agreement = {
            f"{timing.engine}-{timing.length}": agrees
            for timing in self.timings
            if (agrees := self.agrees(timing)) is not None
        }
        return {"lengths": lengths, "growth": growth, "agrees_with_exact": agreement}

    def save(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        content = {
            "settings": self.settings,
            "retention": self.retention.to_dict(),
            "machine": self.machine,
            "gemm_flops": self.gemm_flops,
            "read_bandwidth": self.read_bandwidth,
            "dense_flops_per_token": self.dense_flops_per_token,
            "timings": [asdict(timing) for timing in self.timings],
            "figures": self.figures(),
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any] | None = None) -> "Benchmark":
        """Reads what `save` wrote.

        Raises:
            ValueError: it is a run with other settings than those given.
        """
        content = json.loads(path.read_text())
        if settings is not None:
            check_same_settings(path, content["settings"], settings)
        del content["figures"]
        content["timings"] = [
            Timing(**{**timing, "seconds": tuple(timing["seconds"])}) for timing in content["timings"]
        ]
        content["retention"] = Retention.from_dict(content["retention"])
        return cls(**content)


def check_same_settings(path: Path, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError, with what differs, if a file's settings are not those given."""
    before, now = _flat(found), _flat(json.loads(json.dumps(given)))
    other = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if other:
        differing = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in other)
        raise ValueError(f"{path} is a run with other settings ({differing}): give another folder, or remove it")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _finite(value: Any) -> Any:
    """A figure that is not a number is null in JSON."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
