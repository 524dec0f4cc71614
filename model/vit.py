"""ViT: configuration and model.

Source: transformers' `modeling_vit.py`, whose outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import read_choice, read_integer
from .encoder import Encoder, Head, read_pooler
from .images import ImageConfig, ImageEmbeddings, image_attention, read_image_config
from .layers import PreNormLayer
from .modules import ACTIVATIONS, MLP, LayerNorm, Linear


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageConfig):
    """Configuration of a ViT model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "vit"

    pooler_output_size: int
    pooler_act: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        fields = read_image_config(config, patch_size=16, layer_norm_eps=1e-12)
        return cls(
            **fields,
            intermediate_size=read_integer(config, "intermediate_size", 3072),
            pooler=read_pooler(config, fields["task"]),
            pooler_output_size=read_integer(config, "pooler_output_size", fields["hidden_size"]),
            pooler_act=read_choice(config, "pooler_act", ACTIVATIONS, "tanh"),
        )


class ViTEncoder(Encoder):
    """A ViT model with the head of its task."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        linear = partial(Linear, config.hidden_size, use_bias=True, rngs=rngs, param_dtype=param_dtype)

        def make_layer() -> PreNormLayer:
            mlp = MLP(config, hidden_act=config.hidden_act, use_bias=True, rngs=rngs, param_dtype=param_dtype)
            return PreNormLayer(image_attention(config, rngs=rngs, param_dtype=param_dtype), mlp, make_norm)

        super().__init__(
            config,
            ImageEmbeddings(config, rngs=rngs, param_dtype=param_dtype),
            [make_layer() for _ in range(config.num_hidden_layers)],
            norm=make_norm(),
            pooler=Head(dense=linear(config.pooler_output_size), activation=config.pooler_act)
            if config.pooler
            else None,
            head=None if config.task == "features" else Head(out=linear(config.num_labels)),
            head_pooling="first",
        )
