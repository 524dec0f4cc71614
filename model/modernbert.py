"""ModernBERT: local and global layers in turn, rotary positions, gated MLPs, norms in front.

Source: transformers' `modeling_modernbert.py`, whose outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_boolean, read_choice, read_integer, read_layers, read_number
from .encoder import Encoder, EncoderConfig, Head, TextEmbeddings, masked_lm_head, read_num_labels, read_task
from .layers import PreNormLayer
from .modules import ACTIVATIONS, GatedMLP, LayerNorm, Linear
from .rope import ropes_from_config
from .self_attention import SelfAttention
from .windows import FULL, SLIDING, read_layer_types, windows_by_type


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """Configuration of a ModernBERT model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "modernbert"

    vocab_size: int
    max_position_embeddings: int
    hidden_activation: str
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    decoder_bias: bool
    classifier_bias: bool
    classifier_activation: str
    classifier_pooling: str
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModernBertConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        positions = read_integer(config, "max_position_embeddings", 8192)
        layer_types = _read_layer_types(config)
        ropes = ropes_from_config(
            config,
            positions,
            layer_types,
            theta_fields={FULL: "global_rope_theta", SLIDING: "local_rope_theta"},
            default_thetas={FULL: 160000.0, SLIDING: 10000.0},
            scaled=(FULL, SLIDING),
        )
        # Half of `local_attention` to each side, or `sliding_window`, which wins, and the token itself.
        reach = read_integer(config, "sliding_window", read_integer(config, "local_attention", 128) // 2, least=0)
        window = reach + 1
        return cls(
            task=read_task(config),
            num_labels=read_num_labels(config),
            vocab_size=read_integer(config, "vocab_size", 50368),
            hidden_size=read_integer(config, "hidden_size", 768),
            intermediate_size=read_integer(config, "intermediate_size", 1152),
            num_hidden_layers=len(layer_types),
            num_attention_heads=read_integer(config, "num_attention_heads", 12),
            max_position_embeddings=positions,
            max_tokens=positions,
            hidden_activation=read_choice(config, "hidden_activation", ACTIVATIONS, "gelu"),
            norm_eps=read_number(config, "norm_eps", 1e-5),
            norm_bias=read_boolean(config, "norm_bias", False),
            attention_bias=read_boolean(config, "attention_bias", False),
            mlp_bias=read_boolean(config, "mlp_bias", False),
            decoder_bias=read_boolean(config, "decoder_bias", True),
            classifier_bias=read_boolean(config, "classifier_bias", False),
            classifier_activation=read_choice(config, "classifier_activation", ACTIVATIONS, "gelu"),
            classifier_pooling=read_choice(config, "classifier_pooling", ("cls", "mean"), "cls"),
            tie_word_embeddings=read_boolean(config, "tie_word_embeddings", True),
            ropes=tuple(ropes[layer_type] for layer_type in layer_types),
            windows=windows_by_type(layer_types, window),
        )


class ModernBertEncoder(Encoder):
    """A ModernBERT model with the head of its task."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(
            LayerNorm, config.hidden_size, epsilon=config.norm_eps, use_bias=config.norm_bias, param_dtype=param_dtype
        )
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=0,
            token_types=0,
            norm=make_norm(),
            rngs=rngs,
            param_dtype=param_dtype,
        )
        mlp = partial(GatedMLP, config, rngs=rngs, param_dtype=param_dtype)
        layers = [
            PreNormLayer(
                _self_attention(config, window, rngs, param_dtype),
                mlp(hidden_act=config.hidden_activation, use_bias=config.mlp_bias),
                make_norm,
                # The first layer's input comes from the norm of the embeddings.
                norm_input=index > 0,
            )
            for index, window in enumerate(config.windows)
        ]
        super().__init__(
            config,
            embeddings,
            layers,
            norm=make_norm(),
            head=_head(config, make_norm(), rngs, param_dtype),
            head_pooling={"cls": "first", "mean": "mean"}[config.classifier_pooling],
        )


def _read_layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Each layer's type; older configs say after how many layers a global one comes again."""
    period = read_integer(config, "global_attn_every_n_layers", 3)
    layers = read_layers(config, "num_hidden_layers", 22)
    return read_layer_types(config, [SLIDING if index % period else FULL for index in range(layers)])


def _self_attention(
    config: ModernBertConfig, window: int | None, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> SelfAttention:
    return SelfAttention(
        config,
        use_bias=config.attention_bias,
        window=window,
        rngs=rngs,
        param_dtype=param_dtype,
    )


def _head(config: ModernBertConfig, norm: LayerNorm, rngs: nnx.Rngs, param_dtype: DTypeLike) -> Head | None:
    if config.task == "features":
        return None
    linear = partial(Linear, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
    parts: dict[str, Any] = {
        "dense": linear(config.hidden_size, use_bias=config.classifier_bias),
        "activation": config.classifier_activation,
        "norm": norm,
    }
    if config.task == "masked_lm":
        return masked_lm_head(
            config.vocab_size,
            config.hidden_size,
            tied=config.tie_word_embeddings,
            use_bias=config.decoder_bias,
            rngs=rngs,
            param_dtype=param_dtype,
            **parts,
        )
    return Head(**parts, out=linear(config.num_labels, use_bias=True))
