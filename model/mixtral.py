"""Mixtral: Mistral with a mixture of experts in place of every MLP.

Source: transformers' `modeling_mixtral.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ignored, read_choice, read_integer, read_number, with_own_names
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .moe import SparseMoE, check_experts
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config
from .windows import FULL, SLIDING, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(PreNormConfig):
    """Configuration of a Mixtral model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "mixtral"

    num_local_experts: int
    num_experts_per_tok: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.num_experts_per_tok, self.num_local_experts)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MixtralConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        )
        window = read_window(config, None)
        layer_types = [FULL if window is None else SLIDING] * sizes["num_hidden_layers"]
        experts = with_own_names(config, {"num_experts": "num_local_experts"})
        rope = rope_from_config(config, sizes["max_position_embeddings"], default_theta=1e6)
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-5),
            num_local_experts=read_integer(experts, "num_local_experts", 8),
            num_experts_per_tok=read_integer(config, "num_experts_per_tok", 2),
            ropes=(rope,) * len(layer_types),
            windows=windows_by_type(layer_types, window),
            ignored=ignored(config, layer_types=layer_types),
        )


class MixtralForCausalLM(PreNormCausalLM):
    """A Mixtral language model."""

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        def make_experts(_: int) -> SparseMoE:
            return SparseMoE(
                config.hidden_size,
                config.intermediate_size,
                num_experts=config.num_local_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                norm_topk_prob=True,
                hidden_act=config.hidden_act,
                rngs=rngs,
                param_dtype=param_dtype,
            )

        super().__init__(config, make_mlp=make_experts, rngs=rngs, param_dtype=param_dtype)
