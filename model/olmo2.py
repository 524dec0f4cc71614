"""OLMo 2: norms behind attention and MLP, and of all heads' queries and keys together.

Source: transformers' `modeling_olmo2.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..attention.cache import LayerCache
from .config import read_boolean, read_choice, read_number
from .decoder import CausalLM, DecoderConfig, read_sizes
from .modules import ACTIVATIONS, GatedMLP, RMSNorm
from .rope import rope_from_config
from .self_attention import LayerCall, SelfAttention


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """Configuration of an OLMo 2 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "olmo2"
    default_pad_token_id: ClassVar[int | None] = 1

    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Olmo2Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=50304,
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
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-5),
            attention_bias=read_boolean(config, "attention_bias", False),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
            windows=(None,) * layers,
        )


class Olmo2Layer(nnx.Module):
    """Attention and MLP, each normalised behind and then added to the residual."""

    def __init__(self, config: Olmo2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        make_norm = partial(RMSNorm, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
        self.self_attn = SelfAttention(
            config,
            use_bias=config.attention_bias,
            q_norm=make_norm(config.num_attention_heads * config.head_dim),
            k_norm=make_norm(config.num_key_value_heads * config.head_dim),
            norm_heads=False,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.post_attention_layernorm = make_norm(config.hidden_size)
        self.mlp = GatedMLP(config, hidden_act=config.hidden_act, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        self.post_feedforward_layernorm = make_norm(config.hidden_size)

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        attended, cache = self.self_attn(hidden, call)
        hidden = hidden + self.post_attention_layernorm(attended)
        return hidden + self.post_feedforward_layernorm(self.mlp(hidden)), cache


class Olmo2ForCausalLM(CausalLM):
    """An OLMo 2 language model."""

    def __init__(self, config: Olmo2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            [Olmo2Layer(config, rngs=rngs, param_dtype=param_dtype) for _ in range(config.num_hidden_layers)],
            RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype),
            rngs=rngs,
            param_dtype=param_dtype,
        )
