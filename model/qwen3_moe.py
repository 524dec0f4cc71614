"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP of some or all layers.

Source: transformers' `modeling_qwen3_moe.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ignored, read_boolean, read_choice, read_integer, read_number, with_own_names
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .moe import SparseMoE, check_experts
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config
from .windows import FULL, SLIDING, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(PreNormConfig):
    """Configuration of a Qwen3-MoE model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "qwen3_moe"

    attention_bias: bool
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.num_experts_per_tok, self.num_experts)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=32768,
        )
        # Other than in Qwen3, all layers have the window, whatever max_window_layers says.
        window = read_window(config, 4096) if read_boolean(config, "use_sliding_window", False) else None
        layer_types = [FULL if window is None else SLIDING] * sizes["num_hidden_layers"]
        # transformers 5 writes the number of experts under Mixtral's name for it.
        experts = with_own_names(config, {"num_local_experts": "num_experts"})
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            attention_bias=read_boolean(config, "attention_bias", False),
            moe_intermediate_size=read_integer(config, "moe_intermediate_size", 768),
            num_experts=read_integer(experts, "num_experts", 128),
            num_experts_per_tok=read_integer(config, "num_experts_per_tok", 8),
            norm_topk_prob=read_boolean(config, "norm_topk_prob", False),
            decoder_sparse_step=read_integer(config, "decoder_sparse_step", 1),
            mlp_only_layers=_read_mlp_only_layers(config),
            ropes=(rope_from_config(config, sizes["max_position_embeddings"]),) * len(layer_types),
            windows=windows_by_type(layer_types, window),
            ignored=ignored(config, layer_types=layer_types),
        )


class Qwen3MoeForCausalLM(PreNormCausalLM):
    """A Qwen3-MoE language model."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        def make_experts(layer: int) -> SparseMoE | None:
            if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
                return None
            return SparseMoE(
                config.hidden_size,
                config.moe_intermediate_size,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                hidden_act=config.hidden_act,
                rngs=rngs,
                param_dtype=param_dtype,
            )

        super().__init__(
            config,
            attention_bias=config.attention_bias,
            norm_queries_and_keys=True,
            make_mlp=make_experts,
            rngs=rngs,
            param_dtype=param_dtype,
        )


def _read_mlp_only_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"config: mlp_only_layers is {layers!r}, expected a list of layers' indices")
    return tuple(layers)
