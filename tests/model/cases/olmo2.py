"""OLMo 2."""

import random
from typing import Any

from . import Cases
from .llama import LLAMA3

TINY: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "biases": {"attention_bias": True, "num_key_value_heads": None, "rms_norm_eps": 1e-2, "dtype": "bfloat16"},
    "scaled": {
        "rope_parameters": {**LLAMA3, "rope_theta": 5000.0},
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "max_shard_size": "20KB",
    },
    "head_dim": {"head_dim": 20},
}


def draw(seed: int) -> dict[str, Any]:
    """A random OLMo 2."""
    draw = random.Random(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice([6, 10, 16]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "attention_bias": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {
            **draw.choice([{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5}, LLAMA3]),
            "rope_theta": draw.choice([100.0, 10000.0, 1e6]),
        },
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


CASES = {"olmo2": Cases(TINY, OPTIONS, draw)}
