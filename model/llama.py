"""The Llama family: configuration and model.

Source: transformers' `modeling_llama.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_number, require
from .decoder import CausalLM, DecoderConfig, DecoderLayer, read_sizes
from .layers import ACTIVATIONS, GatedMLP, RMSNorm
from .rope import rope_from_config
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Configuration of a Llama model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "llama"

    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        Raises:
            ValueError: a field out of range, or one that asks for mathematics that this model does not have.
        """
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
        require(config, "sliding_window", None)
        require(config, "layer_types", ["full_attention"] * layers)
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            attention_bias=read_boolean(config, "attention_bias", False),
            mlp_bias=read_boolean(config, "mlp_bias", False),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=(None,) * layers,
        )


class LlamaForCausalLM(CausalLM):
    """A Llama language model."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
        layers = [_layer(config, make_norm, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, make_norm(), rngs=rngs, param_dtype=param_dtype)


def _layer(config: LlamaConfig, make_norm: partial[RMSNorm], rngs: nnx.Rngs, param_dtype: DTypeLike) -> DecoderLayer:
    self_attn = SelfAttention(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        use_bias=config.attention_bias,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        hidden_act=config.hidden_act,
        use_bias=config.mlp_bias,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    return DecoderLayer(self_attn, mlp, make_norm)
