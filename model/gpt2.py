"""GPT-2: configuration and model.

Source: transformers' `modeling_gpt2.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_integer, read_layers, read_number, require, with_own_names
from .decoder import CausalLM, DecoderConfig
from .layers import PreNormLayer
from .modules import ACTIVATIONS, MLP, LayerNorm
from .self_attention import SelfAttention

_COMMON_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names of other configs that transformers reads here too, and GPT-2's own."""


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """Configuration of a GPT-2 model.

    Attributes:
        activation_function: of the MLP.
        layer_norm_epsilon: of all norms.
        scale_attn_weights: whether attention logits are divided by the root of the head's size.
        scale_attn_by_inverse_layer_idx: whether those of layer i, counted from 1, are divided by i as well.
    """

    model_type: ClassVar[str] = "gpt2"

    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        config = with_own_names(config, _COMMON_NAMES)
        require(config, "add_cross_attention", False)
        hidden, heads = read_integer(config, "n_embd", 768), read_integer(config, "n_head", 12)
        if hidden % heads:
            raise ValueError(f"config: n_embd is {hidden}, expected a multiple of n_head, {heads}")
        layers = read_layers(config, "n_layer", 12)
        return cls(
            vocab_size=read_integer(config, "vocab_size", 50257),
            hidden_size=hidden,
            intermediate_size=read_integer(config, "n_inner", 4 * hidden),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            max_position_embeddings=read_integer(config, "n_positions", 1024),
            tie_word_embeddings=read_boolean(config, "tie_word_embeddings", True),
            activation_function=read_choice(config, "activation_function", ACTIVATIONS, "gelu_new"),
            layer_norm_epsilon=read_number(config, "layer_norm_epsilon", 1e-5),
            scale_attn_weights=read_boolean(config, "scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=read_boolean(config, "scale_attn_by_inverse_layer_idx", False),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )

    def attention_scale(self, layer: int) -> float:
        """The factor of a layer's attention logits; layers are counted from 0."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class GPT2LMHeadModel(CausalLM):
    """A GPT-2 language model."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)
        layers = [_layer(config, index, make_norm, rngs, param_dtype) for index in range(config.num_hidden_layers)]
        super().__init__(config, layers, make_norm(), learned_positions=True, rngs=rngs, param_dtype=param_dtype)


def _layer(
    config: GPT2Config, index: int, make_norm: partial[LayerNorm], rngs: nnx.Rngs, param_dtype: DTypeLike
) -> PreNormLayer:
    self_attn = SelfAttention(
        config,
        use_bias=True,
        scale=config.attention_scale(index),
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(config, hidden_act=config.activation_function, use_bias=True, rngs=rngs, param_dtype=param_dtype)
    return PreNormLayer(self_attn, mlp, make_norm)
