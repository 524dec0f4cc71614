"""SmolLM3."""

import random
from typing import Any

from . import Cases, llama

TINY: dict[str, Any] = {**llama.TINY, "num_hidden_layers": 3, "no_rope_layer_interval": 2, "pad_token_id": None}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

OPTIONS: dict[str, dict[str, Any]] = {
    "interval": {},
    "every_fourth": {"no_rope_layer_interval": 4, "num_hidden_layers": 5, "tie_word_embeddings": False},
    "rope_in_none": {"no_rope_layers": [0, 0, 0], "hidden_act": "gelu"},
    "listed": {"no_rope_layers": [0, 1, 0, 1], "num_key_value_heads": None, "rope_parameters": llama.YARN},
    "windows_without_rope": {"use_sliding_window": True, "sliding_window": 9, "rms_norm_eps": 1e-2},
    "types": {"use_sliding_window": True, "sliding_window": 7, "layer_types": TYPES},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def draw(seed: int) -> dict[str, Any]:
    """A random SmolLM3."""
    draw = random.Random(seed)
    return {
        **llama.draw_sizes(draw),
        **llama.draw_biases(draw),
        "no_rope_layers": draw.choice([None, [1, 0, 1], [0, 1, 1]]),
        "use_sliding_window": draw.random() < 0.5,
        "sliding_window": draw.choice([None, 3, 30]),
    }


CASES = {"smollm3": Cases(TINY, OPTIONS, draw)}
