"""RoBERTa and XLM-RoBERTa."""

from typing import Any

from . import Cases, bert

TINY: dict[str, Any] = {**bert.TINY, "type_vocab_size": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {"pad_token_id": 5, "hidden_act": "relu", "type_vocab_size": 2, "layer_norm_eps": 1e-3},
    "untied": {"task": "AutoModelForMaskedLM", "tie_word_embeddings": False, "hidden_act": "relu"},
}


def draw(seed: int) -> dict[str, Any]:
    """A random RoBERTa."""
    return {**bert.draw(seed), "pad_token_id": seed % 4}


CASES = {
    "roberta": Cases(TINY, OPTIONS, draw, bert.TASKS),
    "xlm-roberta": Cases(TINY, {}, draw, bert.TASKS[1:3]),
}
