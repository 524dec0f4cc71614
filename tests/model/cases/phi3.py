"""Phi-3 and Phi-4."""

import random
from typing import Any

from . import Cases, llama

WITHOUT_HEAD_DIM = {name: value for name, value in llama.TINY.items() if name != "head_dim"}
TINY: dict[str, Any] = {**WITHOUT_HEAD_DIM, "hidden_size": 64, "pad_token_id": None}

OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {"num_key_value_heads": None},
    "grouped": {"sliding_window": 9, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "window_as_wide_as_a_row": {"sliding_window": 512, "tie_word_embeddings": True},
    "partial": {"partial_rotary_factor": 0.75},
    "longrope": {
        "rope_parameters": llama.LONGROPE,
        "original_max_position_embeddings": 40,
        "max_position_embeddings": 64,
    },
    "partial_longrope": {
        "rope_parameters": {
            **llama.LONGROPE,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 5.0, 8.0],
            "partial_rotary_factor": 0.5,
            "rope_theta": 300.0,
        },
        "original_max_position_embeddings": 40,
        "tie_word_embeddings": True,
    },
}


def draw(seed: int) -> dict[str, Any]:
    """A random Phi-3."""
    draw = random.Random(seed)
    kv_heads, group, share = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([0.5, 0.75, 1.0])
    pairs = int(16 * share) // 2
    rope: dict[str, Any] = {"rope_type": "default"}
    if draw.random() < 0.5:
        factors = {name: [draw.uniform(1, 9) for _ in range(pairs)] for name in ("short_factor", "long_factor")}
        rope = {"rope_type": "longrope", **factors}
    sizes = llama.draw_sizes(draw)
    del sizes["head_dim"]
    return {
        **sizes,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * 16,
        # Not shorter than the rows of the tests: a window that is wider counts as none.
        "max_position_embeddings": 64,
        "original_max_position_embeddings": draw.choice([20, 40]),
        "sliding_window": draw.choice([None, 5, 40]),
        "rope_parameters": {**rope, "rope_theta": 500.0, "partial_rotary_factor": share},
    }


CASES = {"phi3": Cases(TINY, OPTIONS, draw)}
