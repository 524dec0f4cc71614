"""GPT-NeoX."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 700, "dtype": "float16"},
    "no_biases": {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_fast",
        "layer_norm_eps": 1e-2,
        "max_shard_size": "20KB",
    },
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
        "max_position_embeddings": 40,
    },
}


def draw(seed: int) -> dict[str, Any]:
    """A random GPT-NeoX."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 5])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([8, 12, 20]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu"]),
        "attention_bias": draw.random() < 0.5,
        "use_parallel_residual": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "layer_norm_eps": draw.choice([1e-5, 1e-3]),
        "rotary_pct": draw.choice([0.25, 0.5, 1.0]),
        "rotary_emb_base": draw.choice([100, 10000]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


CASES = {"gpt_neox": Cases(TINY, OPTIONS, draw)}
