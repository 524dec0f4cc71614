"""Gemma 1: Llama's layers with scaled embeddings and norms whose weights count from 1.

Source: transformers' `modeling_gemma.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_number, require
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(PreNormConfig):
    """Configuration of a Gemma 1 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "gemma"
    default_pad_token_id: ClassVar[int | None] = 0

    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        layers = sizes["num_hidden_layers"]
        hidden_act = read_choice(config, "hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
        if hidden_act == "gelu":
            # The first published configs name the exact function, but the models were trained with the tanh form.
            hidden_act = "gelu_pytorch_tanh"
        require(config, "hidden_activation", hidden_act)
        require(config, "use_bidirectional_attention", False)
        return cls(
            **sizes,
            hidden_act=hidden_act,
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            attention_bias=read_boolean(config, "attention_bias", False),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=(None,) * layers,
        )


class GemmaForCausalLM(PreNormCausalLM):
    """A Gemma 1 language model."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            attention_bias=config.attention_bias,
            norm_weight_offset=1.0,
            embedding_multiplier=config.hidden_size**0.5,
            rngs=rngs,
            param_dtype=param_dtype,
        )
