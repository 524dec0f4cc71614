"""BERT: configuration and model.

Source: transformers' `modeling_bert.py`, whose outputs these equal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_integer, read_layers, read_number, require
from .encoder import (
    Encoder,
    EncoderConfig,
    Head,
    TextEmbeddings,
    masked_lm_head,
    read_num_labels,
    read_pooler,
    read_task,
)
from .layers import PostNormLayer
from .modules import ACTIVATIONS, MLP, LayerNorm, Linear
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Configuration of a BERT model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str
    layer_norm_eps: float
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        fields = read_bert(config)
        task = fields["task"]
        pooler = task == "sequence_classification" or read_pooler(config, task)
        return cls(**fields, pooler=pooler, max_tokens=fields["max_position_embeddings"])

    @property
    def padding_id(self) -> int | None:
        """As `TextEmbeddings` has it."""
        return None


def read_bert(config: Mapping[str, Any], vocab_size: int = 30522) -> dict[str, Any]:
    """The fields of a `BertConfig` but `pooler` and `max_tokens`; `vocab_size` is the default.

    Raises:
        ValueError: as `BertConfig.from_hf`.
    """
    for name in ("is_decoder", "add_cross_attention"):
        require(config, name, False)
    require(config, "position_embedding_type", "absolute")
    layers = read_layers(config, "num_hidden_layers", 12)
    return {
        "task": read_task(config),
        "num_labels": read_num_labels(config),
        "vocab_size": read_integer(config, "vocab_size", vocab_size),
        "hidden_size": read_integer(config, "hidden_size", 768),
        "intermediate_size": read_integer(config, "intermediate_size", 3072),
        "num_hidden_layers": layers,
        "num_attention_heads": read_integer(config, "num_attention_heads", 12),
        "max_position_embeddings": read_integer(config, "max_position_embeddings", 512),
        "type_vocab_size": read_integer(config, "type_vocab_size", 2),
        "hidden_act": read_choice(config, "hidden_act", ACTIVATIONS, "gelu"),
        "layer_norm_eps": read_number(config, "layer_norm_eps", 1e-12),
        "tie_word_embeddings": read_boolean(config, "tie_word_embeddings", True),
        "ropes": (None,) * layers,
        "windows": (None,) * layers,
    }


class BertEncoder(Encoder):
    """A BERT model with the head of its task.

    Attributes:
        masked_lm_activation: of the head of masked language models; None for the config's `hidden_act`.
        classifier_activation: of a dense layer that sequence classification puts on the first token; None where it
            reads the pooler.
    """

    masked_lm_activation: ClassVar[str | None] = None
    classifier_activation: ClassVar[str | None] = None

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        linear = partial(Linear, config.hidden_size, use_bias=True, rngs=rngs, param_dtype=param_dtype)
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            token_types=config.type_vocab_size,
            norm=make_norm(),
            padding_id=config.padding_id,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        layers = [bert_layer(config, make_norm, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(
            config,
            embeddings,
            layers,
            pooler=Head(dense=linear(config.hidden_size), activation="tanh") if config.pooler else None,
            head=self._head(config, linear, make_norm, rngs, param_dtype),
            head_pooling="pooler" if self.classifier_activation is None else "first",
        )

    def _head(
        self,
        config: BertConfig,
        linear: Callable[[int], Linear],
        make_norm: Callable[[], LayerNorm],
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> Head | None:
        if config.task == "features":
            return None
        if config.task == "masked_lm":
            return masked_lm_head(
                config.vocab_size,
                config.hidden_size,
                tied=config.tie_word_embeddings,
                rngs=rngs,
                param_dtype=param_dtype,
                dense=linear(config.hidden_size),
                activation=self.masked_lm_activation or config.hidden_act,
                norm=make_norm(),
            )
        if config.task == "sequence_classification" and self.classifier_activation is not None:
            return Head(
                dense=linear(config.hidden_size), activation=self.classifier_activation, out=linear(config.num_labels)
            )
        return Head(out=linear(config.num_labels))


def bert_layer(
    config: BertConfig, make_norm: Callable[[], LayerNorm], rngs: nnx.Rngs, param_dtype: DTypeLike
) -> PostNormLayer:
    """A layer of BERT and of the models that share it."""
    self_attn = SelfAttention(
        config,
        use_bias=True,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(config, hidden_act=config.hidden_act, use_bias=True, rngs=rngs, param_dtype=param_dtype)
    return PostNormLayer(self_attn, mlp, make_norm)
