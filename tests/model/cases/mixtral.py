"""Mixtral."""

import random
from typing import Any

from . import Cases, llama

# Every token takes all experts but in the cases that say else: in half precision a router may prefer another expert, in
# torch too, and what that makes of a token's logits says nothing about rounding.
TINY: dict[str, Any] = {**llama.TINY, "num_local_experts": 4, "num_experts_per_tok": 4}

OPTIONS: dict[str, dict[str, Any]] = {
    "two_of_four": {"num_experts_per_tok": 2},
    "stacked": {"num_experts_per_tok": 3, "save_original_format": False, "sliding_window": 9, "max_shard_size": "30KB"},
    "one_of_three": {"num_local_experts": 3, "num_experts_per_tok": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "all_of_five": {"num_local_experts": 5, "num_experts_per_tok": 5, "rope_parameters": llama.YARN},
    "tied": {"num_experts_per_tok": 2, "tie_word_embeddings": True, "num_key_value_heads": 4, "dtype": "bfloat16"},
}


def draw(seed: int) -> dict[str, Any]:
    """A random Mixtral."""
    draw = random.Random(seed)
    experts = draw.randrange(1, 9)
    return {
        **llama.draw_sizes(draw),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.randrange(1, experts + 1),
        "sliding_window": draw.choice([None, 2, 30]),
        "save_original_format": draw.random() < 0.5,
    }


CASES = {"mixtral": Cases(TINY, OPTIONS, draw)}
