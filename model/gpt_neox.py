"""GPT-NeoX and Pythia: configuration and model.

Source: transformers' `modeling_gpt_neox.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ignored, read_boolean, read_choice, read_number, require
from .decoder import CausalLM, DecoderConfig, read_sizes
from .layers import ParallelLayer, PreNormLayer
from .modules import ACTIVATIONS, MLP, LayerNorm
from .rope import rope_from_config
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    """Configuration of a GPT-NeoX model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "gpt_neox"

    hidden_act: str
    layer_norm_eps: float
    attention_bias: bool
    use_parallel_residual: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPTNeoXConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            {**config, "num_key_value_heads": None},
            vocab_size=50432,
            hidden_size=6144,
            intermediate_size=24576,
            num_hidden_layers=44,
            num_attention_heads=64,
            max_position_embeddings=2048,
        )
        require(config, "head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
        layers, positions = sizes["num_hidden_layers"], sizes["max_position_embeddings"]
        rope = rope_from_config(
            config,
            positions,
            default_partial_rotary_factor=0.25,
            theta_field="rotary_emb_base",
            partial_rotary_field="rotary_pct",
        )
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "gelu"),
            layer_norm_eps=read_number(config, "layer_norm_eps", 1e-5),
            attention_bias=read_boolean(config, "attention_bias", True),
            use_parallel_residual=read_boolean(config, "use_parallel_residual", True),
            ropes=(rope,) * layers,
            windows=(None,) * layers,
            ignored=ignored(config, num_key_value_heads=sizes["num_attention_heads"]),
        )


class GPTNeoXForCausalLM(CausalLM):
    """A GPT-NeoX language model."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        layers = [_layer(config, make_norm, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, make_norm(), rngs=rngs, param_dtype=param_dtype)


def _layer(
    config: GPTNeoXConfig, make_norm: partial[LayerNorm], rngs: nnx.Rngs, param_dtype: DTypeLike
) -> PreNormLayer | ParallelLayer:
    self_attn = SelfAttention(
        config,
        use_bias=config.attention_bias,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(config, hidden_act=config.hidden_act, use_bias=True, rngs=rngs, param_dtype=param_dtype)
    if config.use_parallel_residual:
        return ParallelLayer(self_attn, mlp, make_norm, share_norm=False)
    return PreNormLayer(self_attn, mlp, make_norm)
