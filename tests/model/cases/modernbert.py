"""ModernBERT."""

import random
from typing import Any

from . import Cases, bert

# Ids of special tokens inside of the vocabulary: the embedding of the padding id is set apart when weights are made.
IDS = {"pad_token_id": 3, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
TINY: dict[str, Any] = {
    **{name: value for name, value in bert.TINY.items() if name != "max_position_embeddings"},
    **IDS,
    "num_hidden_layers": 4,
    "local_attention": 10,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "biases": {
        "task": "AutoModelForMaskedLM",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "classifier_activation": "relu",
        "hidden_activation": "silu",
        "norm_eps": 1e-3,
        "sparse_prediction": True,
    },
    "untied": {"task": "AutoModelForMaskedLM", "tie_word_embeddings": False, "decoder_bias": True},
    "no_decoder_bias": {"task": "AutoModelForMaskedLM", "decoder_bias": False, "global_attn_every_n_layers": 2},
    "mean": {
        "task": "AutoModelForSequenceClassification",
        "classifier_pooling": "mean",
        "local_attention": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
}


def draw(seed: int) -> dict[str, Any]:
    """A random ModernBERT."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([6, 10, 16]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 6),
        "global_attn_every_n_layers": draw.randrange(1, 4),
        "local_attention": draw.randrange(1, 40),
        "classifier_pooling": draw.choice(["cls", "mean"]),
        "hidden_activation": draw.choice(["gelu", "relu", "silu"]),
        "decoder_bias": draw.random() < 0.5,
        "norm_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "classifier_bias": draw.random() < 0.5,
        "global_rope_theta": draw.choice([100.0, 160000.0]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
    }


CASES = {"modernbert": Cases(TINY, OPTIONS, draw, bert.TASKS)}
