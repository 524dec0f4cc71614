"""SmolLM3: Llama with layers without rotary embedding ("NoPE"), every fourth by default.

Source: transformers' `modeling_smollm3.py`, whose logits these equal.
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
class SmolLM3Config(PreNormConfig):
    """Configuration of a SmolLM3 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "smollm3"
    default_pad_token_id: ClassVar[int | None] = 128004

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "SmolLM3Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        rotated = _read_rotated_layers(config, sizes["num_hidden_layers"])
        rope = rope_from_config(config, sizes["max_position_embeddings"], default_theta=2e6)
        window = read_window(config, None)
        slides = read_boolean(config, "use_sliding_window", False) and window is not None
        layer_types = read_layer_types(config, [SLIDING if slides and not rotates else FULL for rotates in rotated])
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            attention_bias=read_boolean(config, "attention_bias", False),
            mlp_bias=read_boolean(config, "mlp_bias", False),
            ropes=tuple(rope if rotates else None for rotates in rotated),
            windows=windows_by_type(layer_types, window),
        )


class SmolLM3ForCausalLM(PreNormCausalLM):
    """A SmolLM3 language model."""

    def __init__(self, config: SmolLM3Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )


def _read_rotated_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have the rotary embedding: in `no_rope_layers` 1 stands for those, against its name."""
    flags = config.get("no_rope_layers")
    if flags is None:
        interval = read_integer(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    known = isinstance(flags, list | tuple) and all(flag in (0, 1) for flag in flags)
    if not known or len(flags) < layers:
        raise ValueError(f"config: no_rope_layers is {flags!r}, expected 0 or 1 for each of {layers} layers")
    return [flag == 1 for flag in flags[:layers]]
