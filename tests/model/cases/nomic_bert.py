"""Nomic-BERT in transformers' names; those of the model's authors are in `test_nomic_bert.py`."""

import random
from typing import Any

from . import Cases, bert

TINY: dict[str, Any] = bert.TINY
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {
        "task": "AutoModelForMaskedLM",
        "hidden_act": "gelu",
        "type_vocab_size": 3,
        "layer_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
}


def draw(seed: int) -> dict[str, Any]:
    """A random Nomic-BERT."""
    return {
        **bert.draw(seed),
        "rope_parameters": {"rope_type": "default", "rope_theta": random.Random(seed).choice([50.0, 1000.0, 1e5])},
    }


CASES = {"nomic_bert": Cases(TINY, OPTIONS, draw, bert.TASKS[:4])}
