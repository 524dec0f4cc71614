"""The Llama family: configuration and model.

Source: transformers' `modeling_llama.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ignored, read_boolean, read_choice, read_number
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(PreNormConfig):
    """Configuration of a Llama model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "llama"

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
        )
        layers = sizes["num_hidden_layers"]
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            attention_bias=read_boolean(config, "attention_bias", False),
            mlp_bias=read_boolean(config, "mlp_bias", False),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=(None,) * layers,
            ignored=ignored(config, sliding_window=None, layer_types=["full_attention"] * layers),
        )


class LlamaForCausalLM(PreNormCausalLM):
    """A Llama language model."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )
