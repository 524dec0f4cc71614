"""Nomic-BERT: BERT with rotary positions and gated MLPs, without biases.

Source: transformers' `modeling_nomic_bert.py`, whose outputs these equal; its conversion mapping and the published
configs for the names that the model's authors gave fields and tensors before.
"""

from collections.abc import Mapping
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
from .modules import ACTIVATIONS, GatedMLP, LayerNorm, Linear
from .rope import Rope, rope_from_config
from .self_attention import SelfAttention

AUTHORS_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""What the authors' configs call transformers' fields."""

AUTHORS_LIMITS: dict[str, object] = {
    "causal": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "num_experts": 0,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_rms_norm": False,
}
"""Fields of the authors' configs that choose the mathematics, and what they must say."""

GATED = {"swiglu": "silu", "geglu": "gelu"}
"""Activations by the authors' names of the gated MLPs."""


@dataclass(frozen=True, kw_only=True)
class NomicBertConfig(EncoderConfig):
    """Configuration of a Nomic-BERT model; fields are named as in the Hugging Face config.

    Attributes:
        head_bias: whether the head of masked language models has biases; those of the authors' models do not.
    """

    model_type: ClassVar[str] = "nomic_bert"

    vocab_size: int
    type_vocab_size: int
    hidden_act: str
    layer_norm_eps: float
    tie_word_embeddings: bool
    head_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "NomicBertConfig":
        """Reads a Hugging Face config in transformers' names or in those of the model's authors."""
        for name, supported in AUTHORS_LIMITS.items():
            require(config, name, supported)

        def field(name: str) -> str:
            return AUTHORS_NAMES[name] if config.get(name) is None and "n_embd" in config else name

        positions = read_integer(config, "max_position_embeddings", 2048)
        layers = read_layers(config, field("num_hidden_layers"), 12)
        hidden = read_integer(config, field("hidden_size"), 768)
        heads = read_integer(config, field("num_attention_heads"), 12)
        require(config, "head_dim", hidden // heads)
        task = read_task(config)
        return cls(
            task=task,
            num_labels=read_num_labels(config),
            pooler=task == "sequence_classification" or read_pooler(config, task),
            vocab_size=_vocab_size(config),
            hidden_size=hidden,
            intermediate_size=read_integer(config, field("intermediate_size"), 3072),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            # Rotary positions go further than those that the model was trained with.
            max_tokens=read_integer(config, "n_positions", positions),
            type_vocab_size=read_integer(config, "type_vocab_size", 2, least=0),
            hidden_act=_hidden_act(config),
            layer_norm_eps=read_number(config, field("layer_norm_eps"), 1e-12),
            tie_word_embeddings=read_boolean(config, "tie_word_embeddings", True),
            head_bias="n_embd" not in config,
            ropes=(_rope(config, positions),) * layers,
            windows=(None,) * layers,
        )


class NomicBertEncoder(Encoder):
    """A Nomic-BERT model with the head of its task."""

    def __init__(self, config: NomicBertConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        linear = partial(Linear, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        embeddings = TextEmbeddings(
            config.hidden_size,
            vocab_size=config.vocab_size,
            positions=0,
            token_types=config.type_vocab_size,
            norm=make_norm(),
            rngs=rngs,
            param_dtype=param_dtype,
        )
        head = None
        if config.task == "masked_lm":
            head = masked_lm_head(
                config.vocab_size,
                config.hidden_size,
                tied=config.tie_word_embeddings,
                use_bias=config.head_bias,
                rngs=rngs,
                param_dtype=param_dtype,
                dense=linear(config.hidden_size, use_bias=config.head_bias),
                activation=config.hidden_act,
                norm=make_norm(),
            )
        elif config.task != "features":
            head = Head(out=linear(config.num_labels, use_bias=True))
        pooler = Head(dense=linear(config.hidden_size, use_bias=True), activation="tanh") if config.pooler else None
        layers = [_layer(config, rngs, param_dtype) for _ in range(config.num_hidden_layers)]
        super().__init__(config, embeddings, layers, pooler=pooler, head=head)


def _layer(config: NomicBertConfig, rngs: nnx.Rngs, param_dtype: DTypeLike) -> PostNormLayer:
    return PostNormLayer(
        SelfAttention(
            config,
            rngs=rngs,
            param_dtype=param_dtype,
        ),
        GatedMLP(config, hidden_act=config.hidden_act, use_bias=False, rngs=rngs, param_dtype=param_dtype),
        partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype),
    )


def _vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the table of embeddings, which the authors' models pad."""
    multiple = read_integer(config, "pad_vocab_size_multiple", 1)
    return -(-read_integer(config, "vocab_size", 30528) // multiple) * multiple


def _hidden_act(config: Mapping[str, Any]) -> str:
    if config.get("hidden_act") is None and config.get("activation_function") is not None:
        return GATED[read_choice(config, "activation_function", GATED, "swiglu")]
    return read_choice(config, "hidden_act", ACTIVATIONS, "silu")


def _rope(config: Mapping[str, Any], positions: int) -> Rope:
    if config.get("rotary_scaling_factor") is None:
        theta_field = "rotary_emb_base" if config.get("rotary_emb_base") is not None else "rope_theta"
        return rope_from_config(config, positions, default_theta=1000.0, theta_field=theta_field)
    return Rope(
        rope_type="dynamic",
        rope_theta=read_number(config, "rotary_emb_base", 1000.0),
        factor=read_number(config, "rotary_scaling_factor"),
        original_max_position_embeddings=read_integer(config, "max_trained_positions", 2048),
    )
