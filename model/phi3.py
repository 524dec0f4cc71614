"""Phi-3 and Phi-4: Llama with a partial rotary embedding, LongRoPE and a sliding window in every layer.

Source: transformers' `modeling_phi3.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .config import ignored, read_choice, read_number
from .decoder import read_sizes
from .modules import ACTIVATIONS
from .pre_norm import PreNormCausalLM, PreNormConfig
from .rope import Rope, rope_from_config
from .windows import FULL, SLIDING, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class Phi3Config(PreNormConfig):
    """Configuration of a Phi-3 model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "phi3"
    default_pad_token_id: ClassVar[int | None] = 32000

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Phi3Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_sizes(
            config,
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
        )
        window = read_window(config, None)
        layer_types = [FULL if window is None else SLIDING] * sizes["num_hidden_layers"]
        unapplied = ignored(config, layer_types=layer_types)
        if window is not None and window >= sizes["max_position_embeddings"]:
            # Wider than any row may be, as in the models with 128k tokens: so these layers see the whole row.
            layer_types, window = [FULL] * len(layer_types), None
        return cls(
            **sizes,
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-5),
            ropes=(_read_rope(config, sizes["max_position_embeddings"]),) * len(layer_types),
            windows=windows_by_type(layer_types, window),
            ignored=unapplied,
        )


class Phi3ForCausalLM(PreNormCausalLM):
    """A Phi-3 language model."""


def _read_rope(config: Mapping[str, Any], max_position_embeddings: int) -> Rope:
    # The context before stretching is a field of its own here, with a default that is used even when it is inside too.
    original = config.get("original_max_position_embeddings")
    rope = rope_from_config(
        {**config, "original_max_position_embeddings": 4096 if original is None else original},
        max_position_embeddings,
        default_partial_rotary_factor=1.0,
        older_types={"su": "longrope", "yarn": "longrope"},
    )
    if rope.rope_type not in ("default", "longrope"):
        raise ValueError(f"config: rope_type is {rope.rope_type!r}, Phi-3 models have only 'default' and 'longrope'")
    return rope
