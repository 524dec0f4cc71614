"""RoBERTa and XLM-RoBERTa: BERT with positions that count from behind the padding id, and other heads.

Source: transformers' `modeling_roberta.py`, whose outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .bert import BertConfig, BertEncoder, read_bert
from .config import read_integer
from .encoder import read_pooler


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Configuration of a RoBERTa model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "roberta"
    default_vocab_size: ClassVar[int] = 50265

    pad_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RobertaConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        fields = read_bert(config, cls.default_vocab_size)
        pad_token_id = read_integer(config, "pad_token_id", 1, least=0)
        positions = fields["max_position_embeddings"]
        if positions < pad_token_id + 2:
            raise ValueError(
                f"config: max_position_embeddings is {positions}, expected at least {pad_token_id + 2}, because "
                f"positions count from pad_token_id + 1, and pad_token_id is {pad_token_id}"
            )
        return cls(
            **fields,
            pooler=read_pooler(config, fields["task"]),
            pad_token_id=pad_token_id,
            max_tokens=positions - pad_token_id - 1,
        )

    @property
    def padding_id(self) -> int:
        """`pad_token_id`."""
        return self.pad_token_id


@dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """Configuration of an XLM-RoBERTa model, which differs in a default only."""

    model_type: ClassVar[str] = "xlm-roberta"
    default_vocab_size: ClassVar[int] = 30522


class RobertaEncoder(BertEncoder):
    """A RoBERTa model with the head of its task."""

    masked_lm_activation = "gelu"
    classifier_activation = "tanh"
