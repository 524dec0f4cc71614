"""The decoder that most architectures since Llama are: RMS norms before attention and before a gated MLP.

Each of them has a file of its own with its config and with what it adds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .decoder import CausalLM, DecoderConfig
from .layers import PreNormLayer
from .modules import GatedMLP, RMSNorm
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class PreNormConfig(DecoderConfig):
    """The further fields that these architectures share."""

    hidden_act: str
    rms_norm_eps: float


class PreNormCausalLM(CausalLM):
    """A language model of such layers.

    Args:
        config: its configuration.
        attention_bias: whether the projections of queries, keys and values have biases.
        output_bias: whether the attention's output projection has one; None for as the others.
        mlp_bias: whether the MLP's projections have biases.
        norm_queries_and_keys: whether each head's queries and keys are normalised before the rotary embedding.
        norm_weight_offset: what the norms' weights are added to, as `RMSNorm` has it.
        scale: factor of the attention's logits, None for 1 / sqrt(head_dim).
        residual_multiplier: factor of what attention and MLP add to the residual.
        embedding_multiplier, logit_multiplier: as in `CausalLM`.
        make_mlp: makes what a layer has in place of the gated MLP, by the layer's index; None from it for the MLP.
    """

    def __init__(
        self,
        config: PreNormConfig,
        *,
        attention_bias: bool = False,
        output_bias: bool | None = None,
        mlp_bias: bool = False,
        norm_queries_and_keys: bool = False,
        norm_weight_offset: float = 0.0,
        scale: float | None = None,
        residual_multiplier: float = 1.0,
        embedding_multiplier: float = 1.0,
        logit_multiplier: float = 1.0,
        make_mlp: Callable[[int], nnx.Module | None] | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        make_norm = partial(
            RMSNorm, epsilon=config.rms_norm_eps, weight_offset=norm_weight_offset, param_dtype=param_dtype
        )

        def make_layer(index: int) -> PreNormLayer:
            self_attn = SelfAttention(
                config,
                use_bias=attention_bias,
                use_output_bias=output_bias,
                q_norm=make_norm(config.head_dim) if norm_queries_and_keys else None,
                k_norm=make_norm(config.head_dim) if norm_queries_and_keys else None,
                scale=scale,
                window=config.windows[index],
                rngs=rngs,
                param_dtype=param_dtype,
            )
            mlp = None if make_mlp is None else make_mlp(index)
            if mlp is None:
                mlp = GatedMLP(
                    config, hidden_act=config.hidden_act, use_bias=mlp_bias, rngs=rngs, param_dtype=param_dtype
                )
            return PreNormLayer(self_attn, mlp, partial(make_norm, config.hidden_size), residual_multiplier)

        super().__init__(
            config,
            [make_layer(index) for index in range(config.num_hidden_layers)],
            make_norm(config.hidden_size),
            embedding_multiplier=embedding_multiplier,
            logit_multiplier=logit_multiplier,
            rngs=rngs,
            param_dtype=param_dtype,
        )
