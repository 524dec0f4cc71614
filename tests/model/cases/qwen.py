"""Qwen2 and Qwen3."""

import random
from typing import Any

from . import Cases, llama

TINY: dict[str, Any] = {**llama.TINY, "num_hidden_layers": 3}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"sliding_window": 5},
    "upper_windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "all_windows": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0, "hidden_act": "gelu"},
    "types": {"use_sliding_window": True, "sliding_window": 7, "layer_types": MIXED, "rms_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": None, "rope_parameters": llama.YARN},
}
OF_QWEN3: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True},
    "derived_head_dim_is_not_used": {"head_dim": 20, "num_attention_heads": 2},
}


def draw_windows(draw: random.Random) -> dict[str, Any]:
    """Random windows."""
    return {
        "use_sliding_window": draw.random() < 0.7,
        "sliding_window": draw.choice([2, 30]),
        "max_window_layers": draw.randrange(3),
    }


def draw_qwen2(seed: int) -> dict[str, Any]:
    """A random Qwen2."""
    draw = random.Random(seed)
    return {**llama.draw_sizes(draw), **draw_windows(draw)}


def draw_qwen3(seed: int) -> dict[str, Any]:
    """A random Qwen3."""
    draw = random.Random(seed)
    return {**llama.draw_sizes(draw), **draw_windows(draw), "attention_bias": draw.random() < 0.5}


CASES = {
    "qwen2": Cases(TINY, OPTIONS, draw_qwen2),
    "qwen3": Cases(TINY, {**OPTIONS, **OF_QWEN3}, draw_qwen3),
}
