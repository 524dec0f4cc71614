"""Gemma 1, 2 and 3, and the language model of a Gemma 3 that sees images."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 8.0}

GEMMA: dict[str, dict[str, Any]] = {
    "grouped": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "untied": {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1, "dtype": "bfloat16"},
    "legacy_activation": {"hidden_act": "gelu", "hidden_activation": None, "head_dim": 24},
    "other": {"hidden_act": "relu", "rms_norm_eps": 1e-2, "num_key_value_heads": 4, "max_shard_size": "20KB"},
}
GEMMA2: dict[str, dict[str, Any]] = {
    "alternating": {"sliding_window": 7, "num_hidden_layers": 3},
    "low_caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 3},
    "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    "given_types": {
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 1,
        "hidden_activation": "silu",
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "rope_parameters": {**LINEAR, "rope_theta": 700.0},
        "max_shard_size": "20KB",
    },
    "all_global": {"layer_types": ["full_attention"] * 2, "dtype": "bfloat16"},
}
GEMMA3: dict[str, dict[str, Any]] = {
    "five_to_one": {"num_hidden_layers": 7, "sliding_window": 9},
    "older_fields": {
        "sliding_window_pattern": 2,
        "sliding_window": 20,
        "rope_theta": 900.0,
        "rope_local_base_freq": 77.0,
        "rope_scaling": LINEAR,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 5,
    },
    "ropes_by_type": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
        "rope_parameters": {
            "full_attention": {**LINEAR, "rope_theta": 60.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_activation": "gelu",
        "rms_norm_eps": 1e-3,
        "dtype": "bfloat16",
        "max_shard_size": "20KB",
    },
    "all_global": {"layer_types": ["full_attention"] * 2},
}


def draw_gemma(seed: int) -> dict[str, Any]:
    """A random Gemma 1."""
    draw = random.Random(seed)
    return {
        **_draw_sizes(draw),
        "hidden_act": draw.choice(["gelu", "gelu_pytorch_tanh", "silu"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([100.0, 10000.0])},
    }


def draw_gemma2(seed: int) -> dict[str, Any]:
    """A random Gemma 2."""
    draw = random.Random(seed)
    return {
        **_draw_sizes(draw),
        **_draw_layers(draw),
        "attn_logit_softcapping": draw.choice([None, 1.0, 50.0]),
        "final_logit_softcapping": draw.choice([None, 1.0, 30.0]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([100.0, 10000.0])},
    }


def draw_gemma3(seed: int) -> dict[str, Any]:
    """A random Gemma 3."""
    draw = random.Random(seed)
    scaling = draw.choice([{"rope_type": "default"}, LINEAR, {"rope_type": "yarn", "factor": 4.0}])
    return {
        **_draw_sizes(draw),
        **_draw_layers(draw),
        "final_logit_softcapping": draw.choice([None, 1.0, 30.0]),
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": draw.choice([100.0, 1e6])},
            "sliding_attention": {"rope_type": "default", "rope_theta": draw.choice([50.0, 10000.0])},
        },
    }


def _draw_sizes(draw: random.Random) -> dict[str, Any]:
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice([6, 10, 16]),
        "head_dim": draw.choice([4, 8, 20, 32]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 5),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


def _draw_layers(draw: random.Random) -> dict[str, Any]:
    return {
        "sliding_window": draw.choice([1, 5, 30, 100]),
        "query_pre_attn_scalar": draw.choice([2, 16, 144]),
        "hidden_activation": draw.choice(["gelu_pytorch_tanh", "gelu", "relu"]),
    }


def with_images(text: dict[str, Any]) -> dict[str, Any]:
    """The config of a Gemma 3 that sees images, with the given language model, but never a cap of its logits."""
    outside = {"dtype", "max_shard_size", "tie_word_embeddings"}
    inside = {name: value for name, value in text.items() if name not in outside | {"final_logit_softcapping"}}
    return {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "text_config": {"model_type": "gemma3_text", **inside},
        **{name: text[name] for name in outside & text.keys()},
    }


CASES = {
    "gemma": Cases(TINY, GEMMA, draw_gemma),
    "gemma2": Cases({**TINY, "sliding_window": 32}, GEMMA2, draw_gemma2),
    "gemma3_text": Cases({**TINY, "sliding_window": 32, "sliding_window_pattern": 2}, GEMMA3, draw_gemma3),
    "gemma3": Cases(
        with_images({**TINY, "sliding_window": 32, "sliding_window_pattern": 2}),
        {name: with_images({**TINY, **GEMMA3[name]}) for name in ("older_fields", "ropes_by_type")},
        lambda seed: with_images({**TINY, **draw_gemma3(seed)}),
    ),
}
