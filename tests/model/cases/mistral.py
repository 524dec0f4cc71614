"""Mistral."""

import random
from typing import Any

from . import Cases, llama

TINY: dict[str, Any] = {**llama.TINY, "sliding_window": None}

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 9, "rms_norm_eps": 1e-2},
    "window_of_itself": {"sliding_window": 1, "hidden_act": "gelu", "tie_word_embeddings": True},
    "wide_window": {"sliding_window": 400, "num_key_value_heads": 4},
    "derived_head_dim": {"head_dim": None, "num_key_value_heads": 1, "hidden_size": 64, "sliding_window": 20},
    "yarn": {"sliding_window": 40, "rope_parameters": llama.YARN},
}


def draw(seed: int) -> dict[str, Any]:
    """A random Mistral."""
    draw = random.Random(seed)
    return {**llama.draw_sizes(draw), "sliding_window": draw.choice([None, 2, 30, 100])}


CASES = {"mistral": Cases(TINY, OPTIONS, draw)}
