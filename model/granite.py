"""Granite: Llama with multipliers of embedding, attention logits, residual updates and output logits.

Source: transformers' `modeling_granite.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_number
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(PreNormConfig):
    """Configuration of a Granite model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "granite"

    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GraniteConfig":
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
            embedding_multiplier=read_number(config, "embedding_multiplier", 1.0),
            attention_multiplier=read_number(config, "attention_multiplier", 1.0),
            residual_multiplier=read_number(config, "residual_multiplier", 1.0),
            logits_scaling=read_number(config, "logits_scaling", 1.0),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=(None,) * layers,
        )


class GraniteForCausalLM(PreNormCausalLM):
    """A Granite language model."""

    def __init__(self, config: GraniteConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            scale=config.attention_multiplier,
            residual_multiplier=config.residual_multiplier,
            embedding_multiplier=config.embedding_multiplier,
            logit_multiplier=1 / config.logits_scaling,
            rngs=rngs,
            param_dtype=param_dtype,
        )
