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

from .config import read_choice, read_integer, read_number, require
from .encoder import Encoder, EncoderConfig, Head, PostNormLayer, TextEmbeddings, TiedHead, read_num_labels, read_task
from .layers import ACTIVATIONS, MLP, LayerNorm, Linear
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        Raises:
            ValueError: a field out of range, or one that asks for mathematics that this model does not have.
        """
        for name in ("is_decoder", "add_cross_attention"):
            require(config, name, False)
        require(config, "position_embedding_type", "absolute")
        layers = read_integer(config, "num_hidden_layers", 12)
        positions = read_integer(config, "max_position_embeddings", 512)
        return cls(
            task=read_task(config),
            num_labels=read_num_labels(config),
            vocab_size=read_integer(config, "vocab_size", 30522),
            hidden_size=read_integer(config, "hidden_size", 768),
            intermediate_size=read_integer(config, "intermediate_size", 3072),
            num_hidden_layers=layers,
            num_attention_heads=read_integer(config, "num_attention_heads", 12),
            max_position_embeddings=positions,
            max_tokens=positions,
            type_vocab_size=read_integer(config, "type_vocab_size", 2),
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "gelu"),
            layer_norm_eps=read_number(config, "layer_norm_eps", 1e-12),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )


class BertEncoder(Encoder):
    """A BERT model with the head of its task."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        linear = partial(Linear, config.hidden_size, use_bias=True, rngs=rngs, param_dtype=param_dtype)
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            token_types=config.type_vocab_size,
            norm=make_norm(),
            rngs=rngs,
            param_dtype=param_dtype,
        )
        layers = [bert_layer(config, make_norm, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        pooled = config.task in ("features", "sequence_classification")
        super().__init__(
            config,
            embeddings,
            layers,
            pooler=Head(dense=linear(config.hidden_size), activation="tanh") if pooled else None,
            head=_head(config, linear, make_norm, param_dtype),
        )


def bert_layer(
    config: Any, make_norm: Callable[[], LayerNorm], rngs: nnx.Rngs, param_dtype: DTypeLike
) -> PostNormLayer:
    """A layer of BERT and of the models that share it; the config has `hidden_act` beside the common fields."""
    self_attn = SelfAttention(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        use_bias=True,
        causal=False,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(
        config.hidden_size,
        config.intermediate_size,
        hidden_act=config.hidden_act,
        use_bias=True,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    return PostNormLayer(self_attn, mlp, make_norm)


def _head(
    config: BertConfig, linear: Callable[[int], Linear], make_norm: Callable[[], LayerNorm], param_dtype: DTypeLike
) -> Head | None:
    if config.task == "features":
        return None
    if config.task == "masked_lm":
        return TiedHead(
            vocab_size=config.vocab_size,
            param_dtype=param_dtype,
            dense=linear(config.hidden_size),
            activation=config.hidden_act,
            norm=make_norm(),
        )
    return Head(out=linear(config.num_labels))
