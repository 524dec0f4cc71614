"""What a folder says of generating text: the ids that end a text, and the settings that are not applied.

As in transformers, generation_config.json says it, or without that config.json, or a language model's config in it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..host.messages import joined, shown
from .json_file import read_json

GENERATION_CONFIG = "generation_config.json"
_EOS = "eos_token_id"
_NESTED = ("decoder", "generator", "text_config")
_DEFAULTS: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "dola_layers": None,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "max_new_tokens": None,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "temperature": 1.0,
    "token_healing": False,
    "top_h": None,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""Settings that change which tokens are generated, and what they are in transformers where a folder says nothing."""
_APPLIED = frozenset(
    {
        *("do_sample", "max_new_tokens", "min_p", "repetition_penalty"),
        *("stop_strings", "temperature", "top_k", "top_p"),
    }
)
"""Those of them that a session applies where its caller gives nothing else."""


def eos_token_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text, in order; those that no token of the vocabulary has are left out.

    They are those of generation_config.json, of config.json where that names none, or of the language model's config
    in it.

    Args:
        folder: a Hugging Face folder, or a checkpoint.
        config: its config.json.
        vocab_size: token ids are below it.

    Raises:
        ValueError: a value that is no id or list of ids.
    """
    return tuple(eos for eos in _named_ids(folder, config) if 0 <= eos < vocab_size)


def generation_settings(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The file with a folder's settings, and those that change which tokens are generated, beside the ids that end a
    text: by name, as far as they differ from what they are in transformers.

    Args:
        folder: a Hugging Face folder, or a checkpoint.
        config: its config.json.
    """
    file, fields = _fields(folder, config)
    return file, {
        name: fields[name]
        for name, default in _DEFAULTS.items()
        if fields.get(name) is not None and fields[name] != default
    }


def unapplied(folder: Path, config: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Sentences on what a folder asks for that generating text will not do.

    Raises:
        ValueError: as `eos_token_ids`.
    """
    sentences = []
    if strange := [eos for eos in _named_ids(folder, config) if not 0 <= eos < vocab_size]:
        sentences.append(
            f"{shown(folder)}: {_EOS} names {joined(strange)}, outside the vocabulary (vocab_size is {vocab_size}): "
            "generation does not stop there"
        )
    file, settings = generation_settings(folder, config)
    if others := {name: value for name, value in settings.items() if name not in _APPLIED}:
        named = ", ".join(f"{name} {_brief(value)}" for name, value in others.items())
        sentences.append(f"{shown(folder / file)} sets {named}, which texts are generated without")
    return sentences


def _named_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    places = {GENERATION_CONFIG: _generation_config(folder) or {}, "config.json": config, **_nested(config)}
    for place, fields in places.items():
        if (value := fields.get(_EOS)) is not None:
            return list(dict.fromkeys(_read_ids(place, value)))
    return []


def _read_ids(place: str, value: Any) -> Iterable[int]:
    """The ids of a value; whole numbers may be written as floats."""
    values: list[Any] = value if isinstance(value, list) else [value]
    if not all(map(_is_whole, values)):
        raise ValueError(
            f"{place}: {_EOS} is {_brief(value)}, expected a token id, a list of them, or null: a whole number each"
        )
    return [int(value) for value in values]


def _is_whole(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _fields(folder: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The settings and the file that they are from; outer ones win over those of the config inside."""
    if (generation := _generation_config(folder)) is not None:
        return GENERATION_CONFIG, generation
    inner = next(iter(_nested(config).values()), {})
    return "config.json", {**inner, **{name: value for name, value in config.items() if value is not None}}


def _generation_config(folder: Path) -> dict[str, Any] | None:
    file = folder / GENERATION_CONFIG
    return read_json(file) if file.exists() else None


def _nested(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The config of the language model inside another, by where it is; the first of those that transformers reads."""
    inner = ((f"config.json, {name}", config[name]) for name in _NESTED if config.get(name))
    return dict([pair for pair in inner if isinstance(pair[1], Mapping)][:1])


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
