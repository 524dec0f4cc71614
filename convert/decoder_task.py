"""Whether a decoder is converted to write text or to encode, where the class in its config alone does not say so."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..model.decoder import CausalLM, DecoderConfig
from ..model.decoder_encoder import FEATURES, GENERATION, base_class, read_decoder_task
from ..model.registry import Architecture, find
from .rules import match, reaches
from .tables import rules_of


def as_embedder(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a sentence embedder, with the base class in the place of one with a head.

    sentence-transformers loads the base class, whichever of them the config names.

    Raises:
        ValueError: an unknown architecture.
    """
    architecture = find(fields)
    if not issubclass(architecture.module, CausalLM):
        names = fields.get("architectures")
        has_head = isinstance(names, list) and not all(str(name).endswith("Model") for name in names)
        return {**fields, "architectures": None} if has_head and fields.get("model_type") else dict(fields)
    if read_decoder_task(fields) != GENERATION:
        return dict(fields)
    return _with_base_class(fields, architecture)


def settle_task(
    fields: Mapping[str, Any],
    architecture: Architecture,
    config: DecoderConfig,
    tensors: Collection[str],
    *,
    pooled: bool,
) -> dict[str, Any]:
    """The config, with the base class in it if it names no class and the tensors are those of the base class.

    Args:
        fields: the Hugging Face config.
        architecture: what it asks for.
        config: as the architecture reads it.
        tensors: names in the weights.
        pooled: whether the folder is that of a sentence embedder.

    Warns:
        UserWarning: that is so; or an output layer is left out because the config names the base class; or the model
            comes with code of its own, which may make another encoder of it.
    """
    rules = rules_of(architecture.table, replace(config, task=GENERATION))
    has_output_layer = any(reaches(rules, name, "lm_head") for name in tensors)
    name = architecture.module.__name__
    if config.task == GENERATION:
        writes = fields.get("architectures") or has_output_layer or config.tie_word_embeddings
        if writes or any(match(rules, tensor, {})[0] is None for tensor in tensors):
            return dict(fields)
        _warn(
            "the config names no class under architectures and the weights have no output layer, so the model is "
            f"converted as {base_class(name)}, an encoder"
        )
        return _with_base_class(fields, architecture)
    if config.task == FEATURES and has_output_layer and not pooled:
        _warn(
            f"architectures names {base_class(name)}, so the model is converted as an encoder, without its output "
            f"layer: to generate text, name {name} there"
        )
    if config.causal and "AutoModel" in (fields.get("auto_map") or ()):
        _warn(
            "auto_map names code that comes with the model and is never run: attention is causal, as in transformers' "
            f"own {base_class(name)}; if it is bidirectional in that code, set is_causal to false in the config"
        )
    return dict(fields)


def _with_base_class(fields: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    return {**fields, "architectures": [base_class(architecture.module.__name__)]}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
