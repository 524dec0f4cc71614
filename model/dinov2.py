"""DINOv2, with and without registers: configuration and model.

Source: transformers' `modeling_dinov2.py` and `modeling_dinov2_with_registers.py`, whose outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .config import read_boolean, read_integer, read_number
from .encoder import Encoder, Head
from .images import ImageConfig, ImageEmbeddings, image_attention, read_image_config
from .modules import MLP, GatedMLP, LayerNorm, Linear
from .self_attention import LayerCall


@dataclass(frozen=True, kw_only=True)
class Dinov2Config(ImageConfig):
    """Configuration of a DINOv2 model; fields are named as in the Hugging Face config.

    Attributes:
        antialias: as `ImageEmbeddings` has it.
    """

    model_type: ClassVar[str] = "dinov2"
    antialias: ClassVar[bool] = False

    use_swiglu_ffn: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Dinov2Config":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks."""
        return cls(**cls._read(config, patch_size=14))

    @staticmethod
    def _read(config: Mapping[str, Any], *, patch_size: int, registers: int = 0) -> dict[str, Any]:
        fields = read_image_config(config, patch_size=patch_size, layer_norm_eps=1e-6, extra_tokens=1 + registers)
        gated = read_boolean(config, "use_swiglu_ffn", False)
        width = int(fields["hidden_size"] * read_number(config, "mlp_ratio", 4.0))
        # A gated MLP has three matrices for two: two thirds of the width, in multiples of 8.
        width = -(-(width * 2 // 3) // 8) * 8 if gated else width
        return {**fields, "intermediate_size": width, "use_swiglu_ffn": gated, "pooler": True}


@dataclass(frozen=True, kw_only=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """Configuration of a DINOv2 model with registers."""

    model_type: ClassVar[str] = "dinov2_with_registers"
    antialias: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Dinov2WithRegistersConfig":
        """As `Dinov2Config.from_hf`."""
        return cls(**cls._read(config, patch_size=16, registers=read_integer(config, "num_register_tokens", 4)))


class Dinov2Encoder(Encoder):
    """A DINOv2 model with the head of its task. Its pooler gives the first token as it is."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            ImageEmbeddings(config, antialias=config.antialias, rngs=rngs, param_dtype=param_dtype),
            [Dinov2Layer(config, rngs=rngs, param_dtype=param_dtype) for _ in range(config.num_hidden_layers)],
            norm=LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype),
            pooler=Head(),
            head=None
            if config.task == "features"
            else FirstAndMeanHead(
                config.extra_tokens,
                Linear(2 * config.hidden_size, config.num_labels, use_bias=True, rngs=rngs, param_dtype=param_dtype),
            ),
            head_pooling="tokens",
        )


class FirstAndMeanHead(Head):
    """Classifies the first token together with the mean of those from `start` on."""

    def __init__(self, start: int, out: Linear) -> None:
        super().__init__(out=out)
        self.start = start

    def __call__(self, x: Float[Array, "batch tokens hidden_size"]) -> Float[Array, "batch features"]:
        mean = jnp.mean(x[:, self.start :].astype(jnp.float32), axis=1).astype(x.dtype)
        return jnp.concatenate([x[:, 0], mean], axis=-1)


class Dinov2Layer(nnx.Module):
    """Attention and MLP, each normalised before, scaled by a learned vector and added to the residual."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        make_norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.input_layernorm = make_norm()
        self.self_attn = image_attention(config, rngs=rngs, param_dtype=param_dtype)
        self.attention_scale = nnx.Param(jnp.ones((config.hidden_size,), param_dtype))
        self.post_attention_layernorm = make_norm()
        self.mlp = (GatedMLP if config.use_swiglu_ffn else MLP)(
            config,
            hidden_act="silu" if config.use_swiglu_ffn else config.hidden_act,
            use_bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.mlp_scale = nnx.Param(jnp.ones((config.hidden_size,), param_dtype))

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], None]:
        attended, _ = self.self_attn(self.input_layernorm(hidden), call)
        hidden = hidden + attended * self.attention_scale[...]
        return hidden + self.mlp(self.post_attention_layernorm(hidden)) * self.mlp_scale[...], None
