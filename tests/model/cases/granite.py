"""Granite."""

import random
from typing import Any

from . import Cases, llama

TINY: dict[str, Any] = {**llama.TINY, "attention_multiplier": 0.3}

OPTIONS: dict[str, dict[str, Any]] = {
    "attention_multiplier_alone": {"attention_multiplier": 0.7, "tie_word_embeddings": True},
    "all_multipliers": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "hidden_act": "gelu",
    },
    "whole_numbers": {"embedding_multiplier": 3, "residual_multiplier": 2, "logits_scaling": 7, "rms_norm_eps": 1e-2},
    "default_multipliers": {"attention_multiplier": 1.0, "rope_parameters": llama.YARN},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
}


def draw(seed: int) -> dict[str, Any]:
    """A random Granite."""
    draw = random.Random(seed)
    return {
        **llama.draw_sizes(draw),
        **llama.draw_biases(draw),
        "embedding_multiplier": draw.choice([1.0, 6.5]),
        "attention_multiplier": draw.uniform(0.05, 0.6),
        "residual_multiplier": draw.uniform(0.1, 1.5),
        "logits_scaling": draw.uniform(0.5, 9.0),
    }


CASES = {"granite": Cases(TINY, OPTIONS, draw)}
