"""DistilBERT."""

from typing import Any

from . import Cases, bert

NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}
"""DistilBERT's names of BERT's fields."""


def translated(fields: dict[str, Any]) -> dict[str, Any]:
    """BERT's fields in DistilBERT's names, without the one that it lacks."""
    return {NAMES.get(name, name): value for name, value in fields.items() if name != "type_vocab_size"}


TINY: dict[str, Any] = translated(bert.TINY)
OPTIONS: dict[str, dict[str, Any]] = {
    "other": {"activation": "relu", "sinusoidal_pos_embds": True},
    "untied": {"task": "AutoModelForMaskedLM", "tie_word_embeddings": False},
}


def draw(seed: int) -> dict[str, Any]:
    """A random DistilBERT."""
    return translated(bert.draw(seed))


CASES = {"distilbert": Cases(TINY, OPTIONS, draw, bert.TASKS)}
