"""DistilBERT: BERT without segments and pooler, with names of its own.

Source: transformers' `modeling_distilbert.py`, whose outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .bert import BertConfig, BertEncoder
from .config import read_boolean, read_choice, read_integer, read_layers, with_own_names
from .encoder import read_num_labels, read_task
from .modules import ACTIVATIONS

_COMMON_NAMES = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
"""Names of other configs that transformers reads here too, and the model's own."""


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """Configuration of a DistilBERT model, in BERT's names."""

    model_type: ClassVar[str] = "distilbert"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DistilBertConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        `sinusoidal_pos_embds` says what the table of positions was filled with before training, no more.

        Raises:
            ValueError: a field out of range.
        """
        config = with_own_names(config, _COMMON_NAMES)
        layers = read_layers(config, "n_layers", 6)
        positions = read_integer(config, "max_position_embeddings", 512)
        return cls(
            task=read_task(config),
            num_labels=read_num_labels(config),
            vocab_size=read_integer(config, "vocab_size", 30522),
            hidden_size=read_integer(config, "dim", 768),
            intermediate_size=read_integer(config, "hidden_dim", 3072),
            num_hidden_layers=layers,
            num_attention_heads=read_integer(config, "n_heads", 12),
            max_position_embeddings=positions,
            max_tokens=positions,
            type_vocab_size=0,
            hidden_act=read_choice(config, "activation", ACTIVATIONS, "gelu"),
            layer_norm_eps=1e-12,
            tie_word_embeddings=read_boolean(config, "tie_word_embeddings", True),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )


class DistilBertEncoder(BertEncoder):
    """A DistilBERT model with the head of its task."""

    classifier_activation = "relu"
