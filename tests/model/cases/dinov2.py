"""DINOv2, with and without registers."""

import random
from functools import partial
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 26,
    "patch_size": 2,
    "num_labels": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {
        "num_channels": 1,
        "patch_size": 5,
        "mlp_ratio": 3,
        "qkv_bias": False,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "use_mask_token": False,
    },
    "gated": {"use_swiglu_ffn": True, "task": "AutoModel"},
}
TASKS = ("AutoModel", "AutoModelForImageClassification")


def draw(seed: int, *, registers: bool) -> dict[str, Any]:
    """A random DINOv2."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    patch = draw.randrange(2, 8)
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([6, 10, 16]),
        "mlp_ratio": draw.randrange(1, 5),
        "num_hidden_layers": draw.randrange(1, 4),
        "num_channels": draw.randrange(1, 4),
        "image_size": patch * draw.randrange(1, 6),
        "patch_size": patch,
        "qkv_bias": draw.choice([True, False]),
        "use_swiglu_ffn": draw.choice([True, False]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
    } | ({"num_register_tokens": draw.randrange(1, 5)} if registers else {})


CASES = {
    "dinov2": Cases(TINY, OPTIONS, partial(draw, registers=False), TASKS),
    "dinov2_with_registers": Cases(TINY, {"one": {"num_register_tokens": 1}}, partial(draw, registers=True), TASKS),
}
