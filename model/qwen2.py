"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and sliding windows in the upper layers if asked.

Source: transformers' `modeling_qwen2.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_integer, read_number
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import rope_from_config
from .windows import FULL, SLIDING, read_layer_types, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(PreNormConfig):
    """Configuration of a Qwen2 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "qwen2"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        return cls(**read_qwen(config))


class Qwen2ForCausalLM(PreNormCausalLM):
    """A Qwen2 language model."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, attention_bias=True, output_bias=False, rngs=rngs, param_dtype=param_dtype)


def read_qwen(config: Mapping[str, Any], *, head_dim: int | None = None) -> dict[str, Any]:
    """The fields that Qwen2 and Qwen3 have in common.

    Raises:
        ValueError: a field out of range.
    """
    sizes = read_sizes(
        config,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=head_dim,
        max_position_embeddings=32768,
    )
    layers = sizes["num_hidden_layers"]
    window = read_window(config, 4096) if read_boolean(config, "use_sliding_window", False) else None
    first = read_integer(config, "max_window_layers", 28, least=0)
    layer_types = read_layer_types(
        config, [FULL if window is None or layer < first else SLIDING for layer in range(layers)]
    )
    return {
        **sizes,
        "hidden_act": read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
        "rms_norm_eps": read_number(config, "rms_norm_eps", 1e-6),
        "ropes": (rope_from_config(config, sizes["max_position_embeddings"]),) * layers,
        "windows": windows_by_type(layer_types, window),
    }
