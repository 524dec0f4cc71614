"""StableLM."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms_of_heads": {"qk_layernorm": True, "use_parallel_residual": True, "dtype": "bfloat16"},
    "biases": {
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 300.0,
        "hidden_act": "gelu",
        "max_shard_size": "20KB",
    },
    "other": {
        "num_key_value_heads": 4,
        "qk_layernorm": True,
        "layer_norm_eps": 1e-2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 1.0},
    },
}


def draw(seed: int) -> dict[str, Any]:
    """A random StableLM."""
    draw = random.Random(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice([8, 16, 24]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "use_qkv_bias": draw.random() < 0.5,
        "qk_layernorm": draw.random() < 0.5,
        "use_parallel_residual": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "partial_rotary_factor": draw.choice([0.25, 0.5, 1.0]),
        "rope_theta": draw.choice([100.0, 10000.0]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


CASES = {"stablelm": Cases(TINY, OPTIONS, draw)}
