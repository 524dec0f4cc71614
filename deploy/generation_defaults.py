"""How a checkpoint wants its texts generated, as its generation_config.json says: what is applied, and what is not."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..host.messages import shown

_SHOWN = 40
_ONLY_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_h", "top_k", "top_p", "typical_p")
_ONLY_BEAMS = ("diversity_penalty", "early_stopping", "length_penalty", "num_beam_groups")


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of generating text, those of transformers where a checkpoint says nothing.

    Attributes:
        do_sample: whether tokens are drawn; if not, the most likely one is taken, whatever the temperature.
        temperature: that logits are divided by.
        top_k: how many of the most likely tokens may be drawn; 0 for all.
        top_p: the most likely tokens that may be drawn have this probability together; 1 for all.
        min_p: least probability of a token that may be drawn, as a share of the most likely one's; 0 for all.
        repetition_penalty: by which logits of tokens that were there before shrink; 1 for none.
        max_new_tokens: that a text has; None if there is no limit.
        stop_strings: texts at which a text ends.
        unsupported: settings that change a text in transformers and are not applied, by name, with their values.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    unsupported: dict[str, Any] = field(default_factory=dict)

    @property
    def effective_temperature(self) -> float:
        """0, which is greedy, unless tokens are drawn."""
        return self.temperature if self.do_sample else 0.0


def read_defaults(settings: Mapping[str, Any]) -> GenerationDefaults:
    """The defaults of a checkpoint.

    Args:
        settings: of generation_config.json, those that differ from transformers' own. A value that makes no sense
            counts as not supported.
    """
    read = {name: read_value(settings[name]) for name, read_value in _READERS.items() if name in settings}
    applied = {name: value for name, value in read.items() if value is not None}
    others = {name: value for name, value in settings.items() if name not in applied}
    without = (() if applied.get("do_sample") else _ONLY_SAMPLING) + (() if "num_beams" in others else _ONLY_BEAMS)
    unsupported = {name: value for name, value in others.items() if name not in without}
    return GenerationDefaults(**applied, unsupported=unsupported)


def disagreements(defaults: GenerationDefaults) -> Iterator[str]:
    """What makes no sense in defaults that come from a manifest."""
    for name, read in _READERS.items():
        value = getattr(defaults, name)
        given = list(value) if isinstance(value, tuple) else value
        if given is not None and read(given) is None:
            yield f"has {shown(value, _SHOWN)} in model.generation.{name}, which is no value for it"


def generation_rows(defaults: GenerationDefaults | None) -> dict[str, str]:
    """The defaults for people, by what they are about; empty for a model that writes no text."""
    if defaults is None:
        return {}
    rows = {"generation": ", ".join(_parts(defaults))}
    if defaults.unsupported:
        asked = ", ".join(f"{name} {shown(value, _SHOWN)}" for name, value in defaults.unsupported.items())
        rows["not applied"] = f"{asked} (generation_config.json)"
    return rows


def _parts(defaults: GenerationDefaults) -> Iterator[str]:
    if not defaults.do_sample:
        yield "greedy"
    else:
        yield f"sampling at temperature {defaults.temperature:g}"
        unlimited = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for name, value in unlimited.items():
            if getattr(defaults, name) != value:
                yield f"{name} {getattr(defaults, name):g}"
    if defaults.repetition_penalty != 1.0:
        yield f"repetition_penalty {defaults.repetition_penalty:g}"
    if defaults.max_new_tokens is not None:
        yield f"up to {defaults.max_new_tokens} new tokens"
    if defaults.stop_strings:
        yield f"up to {' or '.join(map(repr, defaults.stop_strings))}"


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < math.inf else None


def _between(low: float, high: float) -> Callable[[Any], float | None]:
    """A reader of numbers from `low` to `high`; None for others."""

    def read(value: Any) -> float | None:
        number = _number(value)
        return number if number is not None and low <= number <= high else None

    return read


def _at_least(least: int) -> Callable[[Any], int | None]:
    """A reader of whole numbers, also of those that are written as floats; None for others."""

    def read(value: Any) -> int | None:
        number = _number(value)
        return int(value) if number is not None and number.is_integer() and least <= number < 2**63 else None

    return read


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _texts(value: Any) -> tuple[str, ...] | None:
    texts = [value] if isinstance(value, str) else value
    right = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    return tuple(texts) if right else None


_MOST = 1e30
_LEAST = 1e-30
_READERS: dict[str, Callable[[Any], Any]] = {
    "do_sample": _flag,
    "temperature": _between(0.0, _MOST),
    "top_k": _at_least(0),
    "top_p": _between(_LEAST, 1.0),
    "min_p": _between(0.0, 1.0),
    "repetition_penalty": _between(_LEAST, _MOST),
    "max_new_tokens": _at_least(1),
    "stop_strings": _texts,
}
