"""Whisper's encoder: configuration and model. The decoder is not built, its tensors are left out.

Source: transformers' `modeling_whisper.py`, whose encoder's outputs these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .config import read_choice, read_integer, read_layers, with_own_names
from .encoder import Encoder, EncoderConfig, InputInfo, require_class
from .layers import PreNormLayer
from .modules import ACTIVATIONS, MLP, Convolution, Embedding, LayerNorm
from .self_attention import SelfAttention

CLASSES = ("WhisperForConditionalGeneration", "WhisperModel", "WhisperEncoder")
"""What checkpoints with an encoder, and nothing behind it but a decoder, have under `architectures`."""

_COMMON_NAMES = {
    "hidden_size": "d_model",
    "num_key_value_heads": "encoder_attention_heads",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
"""Names of other configs that transformers reads here too, and the model's own."""


@dataclass(frozen=True, kw_only=True)
class WhisperConfig(EncoderConfig):
    """Configuration of Whisper's encoder, whose fields the Hugging Face config names `d_model` and `encoder_...`."""

    model_type: ClassVar[str] = "whisper"

    num_mel_bins: int
    max_source_positions: int
    activation_function: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "WhisperConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        Raises:
            ValueError: a field out of range, or a class that has more than an encoder and a decoder.
        """
        require_class(config, CLASSES)
        config = with_own_names(config, _COMMON_NAMES)
        layers = read_layers(config, "encoder_layers", 4)
        positions = read_integer(config, "max_source_positions", 1500)
        return cls(
            task="features",
            num_labels=0,
            hidden_size=read_integer(config, "d_model", 384),
            intermediate_size=read_integer(config, "encoder_ffn_dim", 1536),
            num_hidden_layers=layers,
            num_attention_heads=read_integer(config, "encoder_attention_heads", 6),
            max_tokens=positions,
            fixed_tokens=positions,
            max_source_positions=positions,
            num_mel_bins=read_integer(config, "num_mel_bins", 80),
            activation_function=read_choice(config, "activation_function", ACTIVATIONS, "gelu"),
            ropes=(None,) * layers,
            windows=(None,) * layers,
        )


class WhisperEncoder(Encoder):
    """Whisper's encoder."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(
            config,
            SoundEmbeddings(config, rngs=rngs, param_dtype=param_dtype),
            [_layer(config, rngs, param_dtype) for _ in range(config.num_hidden_layers)],
            norm=LayerNorm(config.hidden_size, epsilon=1e-5, param_dtype=param_dtype),
        )


class SoundEmbeddings(nnx.Module):
    """Two convolutions over the frames of a mel spectrogram, the second of which halves them, and positions."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        convolution = partial(Convolution, out_features=config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.conv1 = convolution((config.num_mel_bins, 3))
        self.conv2 = convolution((config.hidden_size, 3))
        self.position_embeddings = Embedding(
            config.max_source_positions, config.hidden_size, rngs=rngs, param_dtype=param_dtype
        )
        self.config = config

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "batch tokens hidden_size"]:
        gelu = partial(jax.nn.gelu, approximate=False)
        frames = gelu(self.conv1(windows_of_three(inputs["input_features"].transpose(0, 2, 1))))
        hidden = gelu(self.conv2(windows_of_three(frames, stride=2)))
        positions = self.position_embeddings.embedding[...]
        return (hidden + positions.astype(jnp.float32)).astype(positions.dtype)

    def inputs(self, tokens: int) -> dict[str, InputInfo]:
        """The inputs: log-mel features of two frames for each token."""
        return {
            "input_features": InputInfo((self.config.num_mel_bins, 2 * self.config.max_source_positions), "float32")
        }


def windows_of_three(
    x: Float[Array, "batch frames channels"], stride: int = 1
) -> Float[Array, "batch windows features"]:
    """Each `stride`-th frame with the one before and the one behind it, channel by channel; zeros beyond the ends."""
    frames = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = [padded[:, tap : tap + frames : stride] for tap in range(3)]
    return jnp.stack(taps, axis=-1).reshape(x.shape[0], taps[0].shape[1], -1)


def _layer(config: WhisperConfig, rngs: nnx.Rngs, param_dtype: DTypeLike) -> PreNormLayer:
    self_attn = SelfAttention(
        config,
        use_bias=True,
        use_key_bias=False,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    mlp = MLP(config, hidden_act=config.activation_function, use_bias=True, rngs=rngs, param_dtype=param_dtype)
    return PreNormLayer(self_attn, mlp, partial(LayerNorm, config.hidden_size, epsilon=1e-5, param_dtype=param_dtype))
