"""The encoders of T5, mT5 and umT5: configuration and model. The decoder is not built, its tensors are left out.

Source: transformers' `modeling_t5.py` and `modeling_umt5.py`, whose encoders' outputs these equal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .config import read_boolean, read_choice, read_integer, read_layers, read_number, require, with_own_names
from .encoder import Encoder, EncoderConfig, TextEmbeddings, require_class
from .layers import PreNormLayer
from .modules import ACTIVATIONS, MLP, Embedding, GatedMLP, RMSNorm
from .self_attention import SelfAttention

_PROJECTIONS = {name: (False, name) for name in ACTIVATIONS} | {f"gated-{name}": (True, name) for name in ACTIVATIONS}
# By this name T5 means GELU's approximation.
_PROJECTIONS["gated-gelu"] = (True, "gelu_new")

_COMMON_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
"""Names of other configs that transformers reads here too, and the model's own."""


@dataclass(frozen=True, kw_only=True)
class T5Config(EncoderConfig):
    """Configuration of T5's encoder, whose sizes the Hugging Face config names `d_model`, `d_kv`, `d_ff`, `num_...`.

    Attributes:
        d_kv: width of a head.
        gated, hidden_act: what `feed_forward_proj` says, or `is_gated_act` and `dense_act_fn`, which win.
    """

    model_type: ClassVar[str] = "t5"
    class_prefix: ClassVar[str] = "T5"
    relative_bias: ClassVar[bool] = True
    shared_bias: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    }

    vocab_size: int
    d_kv: int
    gated: bool
    hidden_act: str
    layer_norm_epsilon: float
    relative_attention_num_buckets: int
    relative_attention_max_distance: int

    def __post_init__(self) -> None:
        exact = self.relative_attention_num_buckets // 4
        if not 0 < exact < self.relative_attention_max_distance:
            raise ValueError(
                f"config: relative_attention_num_buckets is {self.relative_attention_num_buckets}, expected at least 4 "
                f"and less than 4 * relative_attention_max_distance, {self.relative_attention_max_distance}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head, whatever `hidden_size` is."""
        return self.d_kv

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        Raises:
            ValueError: a field out of range, or a class that has more than an encoder and a decoder.
        """
        require_class(config, [cls.class_prefix + end for end in ("EncoderModel", "ForConditionalGeneration", "Model")])
        require(config, "is_decoder", False)
        given = {name: value for name, value in config.items() if value is not None}
        fields = cls.defaults | with_own_names(given, _COMMON_NAMES)
        layers = read_layers(fields, "num_layers")
        gated, act = _PROJECTIONS[read_choice(fields, "feed_forward_proj", _PROJECTIONS, "relu")]
        return cls(
            task="features",
            num_labels=0,
            vocab_size=read_integer(fields, "vocab_size"),
            hidden_size=read_integer(fields, "d_model", 512),
            intermediate_size=read_integer(fields, "d_ff"),
            num_hidden_layers=layers,
            num_attention_heads=read_integer(fields, "num_heads"),
            d_kv=read_integer(fields, "d_kv", 64),
            max_tokens=None,
            gated=read_boolean(fields, "is_gated_act", gated),
            hidden_act=read_choice(fields, "dense_act_fn", ACTIVATIONS, act),
            layer_norm_epsilon=read_number(fields, "layer_norm_epsilon", 1e-6),
            relative_attention_num_buckets=read_integer(fields, "relative_attention_num_buckets", 32),
            relative_attention_max_distance=read_integer(fields, "relative_attention_max_distance", 128),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )


@dataclass(frozen=True, kw_only=True)
class MT5Config(T5Config):
    """Configuration of mT5's encoder."""

    model_type: ClassVar[str] = "mt5"
    class_prefix: ClassVar[str] = "MT5"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }


@dataclass(frozen=True, kw_only=True)
class UMT5Config(MT5Config):
    """Configuration of umT5's encoder, whose layers have a relative position bias each."""

    model_type: ClassVar[str] = "umt5"
    class_prefix: ClassVar[str] = "UMT5"
    shared_bias: ClassVar[bool] = False


class T5Encoder(Encoder):
    """The encoder of T5, mT5 or umT5."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(RMSNorm, config.hidden_size, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=0,
            token_types=0,
            norm=None,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        make_bias = partial(RelativeBias, config, rngs=rngs, param_dtype=param_dtype)
        count = config.num_hidden_layers
        biases = [make_bias()] * count if config.shared_bias else [make_bias() for _ in range(count)]

        def make_layer(bias: RelativeBias) -> PreNormLayer:
            self_attn = SelfAttention(
                config,
                scale=1.0,
                relative_bias=bias,
                rngs=rngs,
                param_dtype=param_dtype,
            )
            mlp = (GatedMLP if config.gated else MLP)(
                config,
                hidden_act=config.hidden_act,
                use_bias=False,
                rngs=rngs,
                param_dtype=param_dtype,
            )
            return PreNormLayer(self_attn, mlp, make_norm)

        super().__init__(config, embeddings, [make_layer(bias) for bias in biases], norm=make_norm())


class RelativeBias(nnx.Module):
    """A learned bias by the bucket that the distance of a key from the query falls into."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        buckets, heads = config.relative_attention_num_buckets, config.num_attention_heads
        self.buckets = Embedding(buckets, heads, rngs=rngs, param_dtype=param_dtype)
        self.reach = config.relative_attention_max_distance

    def __call__(self) -> Float[Array, "heads distances"]:
        """The bias of each head at the distances from `-reach` to `reach`; beyond it there are no further buckets."""
        table = self.buckets.embedding[...]
        distance = np.arange(-self.reach, self.reach + 1)
        return table[distance_buckets(distance, table.shape[0], self.reach)].T


def distance_buckets(
    distance: Int[np.ndarray, " distances"], buckets: int, max_distance: int
) -> Int[np.ndarray, " distances"]:
    """T5's bucket of a distance `key - query`: half of the buckets for keys behind the query, half for others; in each
    half, one for each of the smaller distances and, up to `max_distance`, for logarithms of the larger ones.

    Source: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, section 2.1.
    """
    half, exact = buckets // 2, buckets // 4
    far = np.abs(distance)
    # In float32, whose rounding decides the bucket of distances at an edge.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    large = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, large)
