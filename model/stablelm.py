"""StableLM: configuration and model.

Source: transformers' `modeling_stablelm.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_number, require
from .decoder import CausalLM, DecoderConfig, read_sizes
from .layers import ParallelLayer, PreNormLayer
from .modules import ACTIVATIONS, GatedMLP, LayerNorm
from .rope import rope_from_config
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(DecoderConfig):
    """Configuration of a StableLM model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "stablelm"

    hidden_act: str
    layer_norm_eps: float
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "StableLmConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=50304,
            hidden_size=2560,
            intermediate_size=6912,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        )
        require(config, "head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
        layers = sizes["num_hidden_layers"]
        rope = rope_from_config(config, sizes["max_position_embeddings"], default_partial_rotary_factor=0.25)
        if (rotated := rope.rotary_dim(sizes["head_dim"])) % 2:
            raise ValueError(
                f"config: partial_rotary_factor is {rope.partial_rotary_factor}, which rotates {rotated} of "
                f"{sizes['head_dim']} dimensions of a head, expected an even number of them"
            )
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            layer_norm_eps=read_number(config, "layer_norm_eps", 1e-5),
            use_qkv_bias=read_boolean(config, "use_qkv_bias", False),
            qk_layernorm=read_boolean(config, "qk_layernorm", False),
            use_parallel_residual=read_boolean(config, "use_parallel_residual", False),
            ropes=(rope,) * layers,
            windows=(None,) * layers,
        )


class StableLmForCausalLM(CausalLM):
    """A StableLM language model."""

    def __init__(self, config: StableLmConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        layers = [_layer(config, make_norm, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, make_norm(config.hidden_size), rngs=rngs, param_dtype=param_dtype)


def _layer(
    config: StableLmConfig, make_norm: partial[LayerNorm], rngs: nnx.Rngs, param_dtype: DTypeLike
) -> PreNormLayer | ParallelLayer:
    def make_head_norms(heads: int) -> LayerNorm | None:
        """A norm for each head, with a weight of its own."""
        return make_norm((heads, config.head_dim), use_bias=False) if config.qk_layernorm else None

    self_attn = SelfAttention(
        config,
        use_bias=config.use_qkv_bias,
        use_output_bias=False,
        q_norm=make_head_norms(config.num_attention_heads),
        k_norm=make_head_norms(config.num_key_value_heads),
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = GatedMLP(config, hidden_act=config.hidden_act, use_bias=False, rngs=rngs, param_dtype=param_dtype)
    if config.use_parallel_residual:
        return ParallelLayer(self_attn, mlp, partial(make_norm, config.hidden_size), share_norm=True)
    return PreNormLayer(self_attn, mlp, partial(make_norm, config.hidden_size))
