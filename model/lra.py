"""The Transformer of Long Range Arena: norms in front, a classifier over the first token or the mean of all.

The benchmark (Tay et al., arXiv 2011.04006) has no checkpoints of its own; models are what people trained with its code
or with the PyTorch code of Nystromformer, which Skyformer and others took over. A checkpoint is a folder with the state
dict of `ModelForSC` of that code and a config.json, such as

    {"model_type": "lra", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
     "num_attention_heads": 2, "max_position_embeddings": 4000, "num_labels": 2, "classifier_pooling": "padded_mean"}

Sizes as published: `hidden_size`, `qkv_size`, `intermediate_size`, layers, heads, pooling, positions, tokens

    listops        512  512  2048  6  8  cls          sinusoidal  2000 + 1
    text           256  256  1024  4  4  cls          sinusoidal  1000 + 1
    retrieval      128  128   512  4  4  cls          sinusoidal  4000 + 1 (each of two towers)
    image           32   32    64  1  1  cls          learned     1024 + 1
    pathfinder32   128   64   128  1  4  mean         sinusoidal  1024
    PyTorch code    64   64   128  2  2  padded_mean  learned     2000 listops, 4000 text, 1024 images

The benchmark's own models have `hidden_act` gelu_pytorch_tanh, `layer_norm_eps` 1e-6 and no `attention_bias`, and put a
vector of their own before the tokens: make it one more row of the word embeddings, and give its id first.

The matching head of the retrieval task takes two rows, each with a length of its own, and is not supported: its towers
convert with `"architectures": ["LraModel"]`, without a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .config import read_boolean, read_choice, read_integer, read_layers, read_number
from .encoder import Encoder, EncoderConfig, Head, TextEmbeddings, read_num_labels, read_task
from .layers import PreNormLayer
from .modules import ACTIVATIONS, MLP, LayerNorm, Linear
from .self_attention import SelfAttention

POOLINGS = {"cls": "first", "mean": "mean", "padded_mean": "padded_mean"}
"""What the classifier reads, by a config's `classifier_pooling`."""


@dataclass(frozen=True, kw_only=True)
class LraConfig(EncoderConfig):
    """Configuration of a Long Range Arena model.

    Attributes:
        qkv_size: width of queries, keys and values of all heads together.
        position_embedding_type: "learned" or "sinusoidal".
        classifier_pooling: "cls" for the first token, "mean" for the mean of a row's tokens, "padded_mean" for their
            sum divided by `max_position_embeddings`: the mean that the PyTorch code takes of rows padded with zeros.
        tied_weights: whether all layers are one.
    """

    model_type: ClassVar[str] = "lra"

    vocab_size: int
    qkv_size: int
    max_position_embeddings: int
    position_embedding_type: str
    hidden_act: str
    layer_norm_eps: float
    attention_bias: bool
    classifier_pooling: str
    tied_weights: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_size % self.num_attention_heads:
            raise ValueError(
                f"config: qkv_size is {self.qkv_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"config: hidden_size is {self.hidden_size}, expected an even number for sinusoids")
        if self.task not in ("features", "sequence_classification"):
            raise ValueError(
                f"config: architectures asks for {self.task}, supported: only LraForSequenceClassification and, "
                "without a head, LraModel"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.qkv_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LraConfig":
        """Reads a config.json; sizes and `max_position_embeddings` have no defaults.

        Raises:
            ValueError: a field that is missing or out of range.
        """
        hidden = read_integer(config, "hidden_size")
        layers = read_layers(config, "num_hidden_layers")
        positions = read_integer(config, "max_position_embeddings")
        return cls(
            task=read_task({"architectures": config.get("architectures") or ["LraForSequenceClassification"]}),
            num_labels=read_num_labels(config),
            vocab_size=read_integer(config, "vocab_size"),
            hidden_size=hidden,
            qkv_size=read_integer(config, "qkv_size", hidden),
            intermediate_size=read_integer(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=read_integer(config, "num_attention_heads"),
            max_position_embeddings=positions,
            max_tokens=positions,
            position_embedding_type=read_choice(
                config, "position_embedding_type", ("learned", "sinusoidal"), "learned"
            ),
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "gelu"),
            layer_norm_eps=read_number(config, "layer_norm_eps", 1e-5),
            attention_bias=read_boolean(config, "attention_bias", True),
            classifier_pooling=read_choice(config, "classifier_pooling", POOLINGS, "mean"),
            tied_weights=read_boolean(config, "tied_weights", False),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )


class SinusoidalPositions(nnx.Module):
    """Sines and cosines of a position in turn, of wavelengths from 2 pi to 10000 * 2 pi."""

    def __init__(self, features: int, dtype: DTypeLike) -> None:
        self.features, self.dtype = features, dtype

    def __call__(self, positions: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens features"]:
        frequencies = jnp.exp(jnp.arange(0, self.features, 2) * (-math.log(10000.0) / self.features))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return pairs.reshape(*positions.shape, self.features).astype(self.dtype)


class LraEncoder(Encoder):
    """A Long Range Arena model with its classifier."""

    def __init__(self, config: LraConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        learned = config.position_embedding_type == "learned"
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings
            if learned
            else SinusoidalPositions(config.hidden_size, param_dtype),
            token_types=0,
            norm=None,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        linear = partial(Linear, use_bias=True, rngs=rngs, param_dtype=param_dtype)
        # Of tied layers the parameters are there once, as layer 0.
        different = [_layer(config, rngs, param_dtype) for _ in range(1 if config.tied_weights else len(config.ropes))]
        super().__init__(
            config,
            embeddings,
            different * config.num_hidden_layers if config.tied_weights else different,
            norm=LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype),
            head=None
            if config.task == "features"
            else Head(
                dense=linear(config.hidden_size, config.intermediate_size),
                activation="relu",
                out=linear(config.intermediate_size, config.num_labels),
            ),
            head_pooling=POOLINGS[config.classifier_pooling],
        )


def _layer(config: LraConfig, rngs: nnx.Rngs, param_dtype: DTypeLike) -> PreNormLayer:
    self_attn = SelfAttention(
        config,
        use_bias=config.attention_bias,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(config, hidden_act=config.hidden_act, use_bias=True, rngs=rngs, param_dtype=param_dtype)
    return PreNormLayer(
        self_attn, mlp, partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
    )
