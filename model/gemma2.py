"""Gemma 2: configuration and model.

Source: transformers' `modeling_gemma2.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_number, read_optional_number, require
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .rope import rope_from_config
from .sandwich_norm import SandwichCausalLM, SandwichConfig
from .windows import FULL, SLIDING, read_layer_types, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(SandwichConfig):
    """Configuration of a Gemma 2 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "gemma2"
    default_pad_token_id: ClassVar[int | None] = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma2Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        require(config, "use_bidirectional_attention", False)
        sizes = read_gemma_sizes(config, vocab_size=256000, max_position_embeddings=8192)
        layers = sizes["num_hidden_layers"]
        types = read_layer_types(config, [FULL if index % 2 else SLIDING for index in range(layers)])
        return cls(
            **sizes,
            **read_gemma_layer(config),
            attn_logit_softcapping=read_optional_number(config, "attn_logit_softcapping", 50.0),
            final_logit_softcapping=read_optional_number(config, "final_logit_softcapping", 30.0),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=windows_by_type(types, read_window(config, 4096)),
        )


def read_gemma_sizes(config: Mapping[str, Any], *, vocab_size: int, max_position_embeddings: int) -> dict[str, Any]:
    """The common fields with the defaults of Gemma 2 and 3, which differ in the two that are given."""
    return read_sizes(
        config,
        vocab_size=vocab_size,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
    )


def read_gemma_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer that Gemma 2 and 3 have with the same defaults."""
    return {
        "hidden_activation": read_choice(config, "hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "rms_norm_eps": read_number(config, "rms_norm_eps", 1e-6),
        "attention_bias": read_boolean(config, "attention_bias", False),
        "query_pre_attn_scalar": read_number(config, "query_pre_attn_scalar", 256.0),
    }


class Gemma2ForCausalLM(SandwichCausalLM):
    """A Gemma 2 language model."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, norm_queries_and_keys=False, rngs=rngs, param_dtype=param_dtype)
