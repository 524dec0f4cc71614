"""Qwen3: Qwen2 with norms of each head's queries and keys in place of most biases.

Source: transformers' `modeling_qwen3.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean
from .pre_norm import PreNormCausalLM, PreNormConfig
from .qwen2 import read_qwen


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(PreNormConfig):
    """Configuration of a Qwen3 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "qwen3"

    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        return cls(
            **read_qwen(config, head_dim=128),
            attention_bias=read_boolean(config, "attention_bias", False),
        )


class Qwen3ForCausalLM(PreNormCausalLM):
    """A Qwen3 language model."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            attention_bias=config.attention_bias,
            norm_queries_and_keys=True,
            rngs=rngs,
            param_dtype=param_dtype,
        )
