"""The encoders of T5, mT5 and umT5."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 120,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {
        "feed_forward_proj": "gated-silu",
        "layer_norm_epsilon": 1e-3,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
    },
}
TASKS = ("AutoModelForTextEncoding",)


def draw(seed: int) -> dict[str, Any]:
    """A random T5."""
    draw = random.Random(seed)
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_heads": draw.choice([1, 2, 3]),
        "d_kv": draw.choice([6, 10, 16]),
        "d_model": draw.randrange(10, 60),
        "d_ff": draw.randrange(20, 120),
        "num_layers": draw.randrange(1, 4),
        "feed_forward_proj": draw.choice(["relu", "gated-gelu"]),
        "relative_attention_num_buckets": draw.randrange(4, 40),
        "relative_attention_max_distance": draw.randrange(12, 140),
        "dtype": draw.choice(["float32", "bfloat16"]),
    }


CASES = {
    "t5": Cases(TINY, OPTIONS, draw, TASKS),
    "mt5": Cases(TINY, {}, draw, TASKS),
    "umt5": Cases(TINY, {}, draw, TASKS),
}
