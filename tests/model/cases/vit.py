"""ViT."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 26,
    "patch_size": 2,
    "num_labels": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {
        "task": "AutoModel",
        "num_channels": 1,
        "image_size": [21, 16],
        "patch_size": [4, 5],
        "qkv_bias": False,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "pooler_output_size": 7,
        "pooler_act": "gelu",
    },
}
TASKS = ("AutoModel", "AutoModelForImageClassification")


def draw(seed: int) -> dict[str, Any]:
    """A random ViT."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([6, 10, 16]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "num_channels": draw.randrange(1, 4),
        "image_size": [draw.randrange(8, 30), draw.randrange(8, 30)],
        "patch_size": [draw.randrange(2, 8), draw.randrange(2, 8)],
        "qkv_bias": draw.choice([True, False]),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu", "silu"]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
    }


CASES = {"vit": Cases(TINY, OPTIONS, draw, TASKS)}
