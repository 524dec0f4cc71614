"""Qwen3-MoE."""

import random
from typing import Any

from . import Cases, llama

# Every token takes all experts but in the cases that say else: in half precision a router may prefer another expert, in
# torch too, and what that makes of a token's logits says nothing about rounding.
TINY: dict[str, Any] = {
    **llama.TINY,
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 24,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "three_of_six": {"num_experts_per_tok": 3, "sliding_window": 5},
    "normed": {
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-2,
        "tie_word_embeddings": True,
    },
    "stacked": {"save_original_format": False, "num_experts_per_tok": 1, "attention_bias": True},
    "every_second": {
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "some_without": {"mlp_only_layers": [0, 2], "rope_parameters": llama.YARN},
}


def draw(seed: int) -> dict[str, Any]:
    """A random Qwen3-MoE."""
    draw = random.Random(seed)
    experts = draw.randrange(1, 9)
    return {
        **llama.draw_sizes(draw),
        "num_experts": experts,
        "num_experts_per_tok": draw.randrange(1, experts + 1),
        "moe_intermediate_size": draw.randrange(5, 40),
        "norm_topk_prob": draw.random() < 0.5,
        "decoder_sparse_step": draw.randrange(1, 3),
        "mlp_only_layers": draw.choice([[], [1], [0, 2]]),
        "attention_bias": draw.random() < 0.5,
        "use_sliding_window": draw.random() < 0.5,
        "sliding_window": draw.choice([2, 30]),
        "save_original_format": draw.random() < 0.5,
    }


CASES = {"qwen3_moe": Cases(TINY, OPTIONS, draw)}
