"""Mistral: Llama with a sliding window in every layer.

Source: transformers' `modeling_mistral.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .config import ignored, read_choice, read_number
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config
from .windows import FULL, SLIDING, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class MistralConfig(PreNormConfig):
    """Configuration of a Mistral model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "mistral"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MistralConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        )
        window = read_window(config, 4096)
        layer_types = [FULL if window is None else SLIDING] * sizes["num_hidden_layers"]
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * len(layer_types),
            windows=windows_by_type(layer_types, window),
            ignored=ignored(config, layer_types=layer_types),
        )


class MistralForCausalLM(PreNormCausalLM):
    """A Mistral language model."""
