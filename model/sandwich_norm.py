"""The decoder that Gemma 2 and 3 are: norms before and behind attention and MLP, local and global layers, caps of the
logits.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..attention.cache import LayerCache
from .decoder import CausalLM, DecoderConfig
from .modules import GatedMLP, RMSNorm
from .self_attention import LayerCall, SelfAttention


@dataclass(frozen=True, kw_only=True)
class SandwichConfig(DecoderConfig):
    """The further fields that both share.

    Attributes:
        hidden_activation: of the MLP.
        rms_norm_eps: of all norms.
        attention_bias: whether the attention's projections have biases.
        query_pre_attn_scalar: attention logits are divided by its root.
        attn_logit_softcapping, final_logit_softcapping: caps of the attention's logits and the model's; None for none.
    """

    hidden_activation: str
    rms_norm_eps: float
    attention_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None


class SandwichLayer(nnx.Module):
    """Attention and MLP, each normalised before and behind and then added to the residual."""

    def __init__(
        self,
        config: SandwichConfig,
        window: int | None,
        norm_queries_and_keys: bool,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        make_norm = partial(RMSNorm, epsilon=config.rms_norm_eps, weight_offset=1.0, param_dtype=param_dtype)
        self.input_layernorm = make_norm(config.hidden_size)
        self.self_attn = SelfAttention(
            config,
            use_bias=config.attention_bias,
            q_norm=make_norm(config.head_dim) if norm_queries_and_keys else None,
            k_norm=make_norm(config.head_dim) if norm_queries_and_keys else None,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            window=window,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.post_attention_layernorm = make_norm(config.hidden_size)
        self.pre_feedforward_layernorm = make_norm(config.hidden_size)
        self.mlp = GatedMLP(
            config, hidden_act=config.hidden_activation, use_bias=False, rngs=rngs, param_dtype=param_dtype
        )
        self.post_feedforward_layernorm = make_norm(config.hidden_size)

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(hidden), call)
        hidden = hidden + self.post_attention_layernorm(attended)
        return hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden))), cache


class SandwichCausalLM(CausalLM):
    """A language model of such layers.

    Args:
        config: its configuration.
        norm_queries_and_keys: whether each head's queries and keys are normalised before the rotary embedding.
    """

    def __init__(
        self,
        config: SandwichConfig,
        *,
        norm_queries_and_keys: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        super().__init__(
            config,
            [
                SandwichLayer(config, window, norm_queries_and_keys, rngs=rngs, param_dtype=param_dtype)
                for window in config.windows
            ],
            RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, weight_offset=1.0, param_dtype=param_dtype),
            embedding_multiplier=config.hidden_size**0.5,
            logit_softcap=config.final_logit_softcapping,
            rngs=rngs,
            param_dtype=param_dtype,
        )
