"""Gemma 3's language model, by itself or as part of a model that sees images too.

Source: transformers' `modeling_gemma3.py`, whose logits for text these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ignored, read_boolean, read_integer, read_optional_number, require
from .gemma2 import read_gemma_layer, read_gemma_sizes
from .rope import ropes_from_config
from .sandwich_norm import SandwichCausalLM, SandwichConfig
from .windows import FULL, SLIDING, read_layer_types, read_window, windows_by_type


@dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(SandwichConfig):
    """Configuration of a Gemma 3 language model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "gemma3_text"
    default_pad_token_id: ClassVar[int | None] = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma3TextConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        sizes = read_gemma_sizes(config, vocab_size=262208, max_position_embeddings=131072)
        pattern = read_integer(config, "sliding_window_pattern", 6)
        types = read_layer_types(
            config, [SLIDING if (index + 1) % pattern else FULL for index in range(sizes["num_hidden_layers"])]
        )
        ropes = ropes_from_config(
            config,
            sizes["max_position_embeddings"],
            types,
            theta_fields={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
            default_thetas={FULL: 1e6, SLIDING: 1e4},
            scaled=(FULL,),
        )
        window, causal = read_window(config, 4096), not read_boolean(config, "use_bidirectional_attention", False)
        if window is not None and not causal:
            # The field counts the keys of both sides together (EmbeddingGemma).
            window = window // 2 + 1
        return cls(
            **sizes,
            **read_gemma_layer(config),
            causal=causal,
            attn_logit_softcapping=None,
            final_logit_softcapping=read_optional_number(config, "final_logit_softcapping", None),
            ropes=tuple(ropes[layer_type] for layer_type in types),
            windows=windows_by_type(types, window),
            ignored=ignored(config, attn_logit_softcapping=None),
        )


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma3TextConfig):
    """Configuration of the language model in a Gemma 3 model that sees images too."""

    model_type: ClassVar[str] = "gemma3"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma3TextConfig:
        """Reads the config's `text_config`, as `Gemma3TextConfig` does; most of the rest is about images.

        Raises:
            ValueError: as there, or `text_config` is not an object.
        """
        text = config.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ValueError(f"config: text_config is {text!r}, expected an object")
        # Honoured there by some of its forms of attention only.
        require(text, "use_bidirectional_attention", False)
        # Whether the output layer is tied is said by the config of the whole.
        whole = {"tie_word_embeddings": config.get("tie_word_embeddings"), "final_logit_softcapping": None}
        checked = super().from_hf({**text, **whole})
        return replace(checked, ignored=(*checked.ignored, *ignored(text, final_logit_softcapping=None)))


class Gemma3ForCausalLM(SandwichCausalLM):
    """A Gemma 3 language model."""

    def __init__(self, config: Gemma3TextConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, norm_queries_and_keys=True, rngs=rngs, param_dtype=param_dtype)


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The language model of a Gemma 3 model that sees images too."""
