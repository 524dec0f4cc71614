"""BERT."""

import random
from typing import Any

from . import Cases

TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_labels": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other": {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-3, "num_labels": 5},
    "untied": {"task": "AutoModelForMaskedLM", "tie_word_embeddings": False},
}
TASKS = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def draw(seed: int) -> dict[str, Any]:
    """A random BERT."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    return {
        "vocab_size": draw.randrange(40, 300),
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([6, 10, 16]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "type_vocab_size": draw.randrange(1, 4),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu", "silu"]),
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
    }


CASES = {"bert": Cases(TINY, OPTIONS, draw, TASKS)}
