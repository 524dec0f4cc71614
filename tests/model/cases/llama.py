"""Llama."""

import random
from typing import Any

from . import Cases

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 3.0, 3.5, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 9.0, 10.0, 11.0],
    "original_max_position_embeddings": 40,
}

TINY: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_query": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "derived_head_dim": {"head_dim": None, "hidden_size": 64},
    "large_head_dim": {"head_dim": 40, "rms_norm_eps": 1e-2, "hidden_act": "gelu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 64},
    "yarn_all_options": {
        "rope_parameters": {**YARN, "beta_fast": 6.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 0.9},
    },
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "tie_word_embeddings": True},
    "sharded": {"max_shard_size": "30KB"},
}


def draw_sizes(draw: random.Random) -> dict[str, Any]:
    """Random values of the fields that all architectures like Llama have."""
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    rope = draw.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 2.5},
            {"rope_type": "dynamic", "factor": 2.0},
            LLAMA3,
            {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20, "mscale": 0.7},
        ]
    )
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice([6, 10, 16]),
        "head_dim": draw.choice([4, 8, 20, 32]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "max_position_embeddings": draw.choice([33, 50]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {**rope, "rope_theta": draw.choice([100.0, 10000.0, 1e6])},
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


def draw_biases(draw: random.Random) -> dict[str, Any]:
    """Random biases."""
    return {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}


def draw(seed: int) -> dict[str, Any]:
    """A random Llama."""
    draw = random.Random(seed)
    return {**draw_sizes(draw), **draw_biases(draw)}


CASES = {"llama": Cases(TINY, OPTIONS, draw)}
