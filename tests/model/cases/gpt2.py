"""GPT-2."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 200,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 72, "dtype": "bfloat16"},
    "unscaled": {"scale_attn_weights": False, "layer_norm_epsilon": 1e-2, "n_positions": 57},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "max_shard_size": "20KB"},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
}


def draw(seed: int) -> dict[str, Any]:
    """A random GPT-2."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4])
    return {
        "vocab_size": draw.randrange(40, 300),
        "n_head": heads,
        "n_embd": heads * draw.choice([5, 8, 16, 20]),
        "n_inner": draw.choice([None, 30, 100]),
        "n_layer": draw.randrange(1, 4),
        "n_positions": draw.choice([57, 100]),
        "activation_function": draw.choice(["gelu_new", "gelu", "relu", "silu"]),
        "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
        "scale_attn_weights": draw.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


CASES = {"gpt2": Cases(TINY, OPTIONS, draw)}
