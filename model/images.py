"""What encoders of images share: the configuration, and patches with their positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from .config import read_boolean, read_choice, read_integer, read_layers, read_number, read_pair, require
from .encoder import EncoderConfig, InputInfo, read_num_labels, read_task
from .modules import ACTIVATIONS, Convolution
from .self_attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class ImageConfig(EncoderConfig):
    """The further fields of an encoder of images; sizes are (height, width) in pixels.

    Attributes:
        image_size: of the images that the checkpoint has positions for.
        input_image_size: of the images that the model is given. Not a field of Hugging Face configs: where it differs
            from `image_size`, positions are interpolated as transformers does for images of another size.
        extra_tokens: tokens before the patches: the first, which stands for the image, and registers.
    """

    num_channels: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    input_image_size: tuple[int, int]
    extra_tokens: int
    qkv_bias: bool
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "input_image_size"):
            size = getattr(self, name)
            if any(whole < patch for whole, patch in zip(size, self.patch_size, strict=True)):
                raise ValueError(
                    f"config: {name} is {list(size)}, expected at least a patch of patch_size, {list(self.patch_size)}"
                )


def read_image_config(
    config: Mapping[str, Any],
    *,
    patch_size: int,
    layer_norm_eps: float,
    extra_tokens: int = 1,
) -> dict[str, Any]:
    """The fields of an `ImageConfig` but `intermediate_size` and `pooler`; the sizes and epsilon are the defaults.

    Raises:
        ValueError: a field out of range, or one that asks for mathematics that these models do not have.
    """
    hidden, heads = read_integer(config, "hidden_size", 768), read_integer(config, "num_attention_heads", 12)
    require(config, "head_dim", hidden // heads)
    layers = read_layers(config, "num_hidden_layers", 12)
    image, patch = read_pair(config, "image_size", 224), read_pair(config, "patch_size", patch_size)
    given = read_pair(config, "input_image_size", image)
    rows, columns = patch_grid(given, patch)
    return {
        "task": read_task(config),
        "num_labels": read_num_labels(config),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_tokens": rows * columns + extra_tokens,
        "fixed_tokens": rows * columns + extra_tokens,
        "num_channels": read_integer(config, "num_channels", 3),
        "image_size": image,
        "patch_size": patch,
        "input_image_size": given,
        "extra_tokens": extra_tokens,
        "qkv_bias": read_boolean(config, "qkv_bias", True),
        "hidden_act": read_choice(config, "hidden_act", ACTIVATIONS, "gelu"),
        "layer_norm_eps": read_number(config, "layer_norm_eps", layer_norm_eps),
        "ropes": (None,) * layers,
        "windows": (None,) * layers,
    }


def patch_grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the whole patches in an image."""
    return size[0] // patch[0], size[1] // patch[1]


class ImageEmbeddings(nnx.Module):
    """Patches with learned positions, behind a token for the image and registers, which have no positions.

    Args:
        config: of the model.
        antialias: whether positions for images of another size are interpolated with antialiasing.
    """

    def __init__(self, config: ImageConfig, *, antialias: bool = False, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        def tokens(count: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((1, count, config.hidden_size), param_dtype))

        window = (config.num_channels, *config.patch_size)
        rows, columns = patch_grid(config.image_size, config.patch_size)
        registers = config.extra_tokens - 1
        self.projection = Convolution(window, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.cls_token = tokens(1)
        self.register_tokens = tokens(registers) if registers else None
        self.position_embeddings = tokens(rows * columns + 1)
        self.config, self.antialias = config, antialias

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "batch tokens hidden_size"]:
        patches = self.projection(self._patches(inputs["pixel_values"]))
        batch, dtype = patches.shape[0], self.cls_token.dtype
        first = jnp.broadcast_to(self.cls_token[...], (batch, 1, patches.shape[2])).astype(jnp.float32)
        hidden = (jnp.concatenate([first, patches], axis=1) + self._positions()).astype(dtype)
        if self.register_tokens is None:
            return hidden
        registers = self.register_tokens[...]
        registers = jnp.broadcast_to(registers, (batch, *registers.shape[1:]))
        return jnp.concatenate([hidden[:, :1], registers, hidden[:, 1:]], axis=1)

    def inputs(self, tokens: int) -> dict[str, InputInfo]:
        """The inputs, whose size the configuration sets."""
        config = self.config
        return {"pixel_values": InputInfo((config.num_channels, *config.input_image_size), "float32")}

    def _patches(
        self, pixels: Float[Array, "batch channels height width"]
    ) -> Float[Array, "batch patches patch_features"]:
        """The pixels of each patch, row by row; pixels that make no whole patch are left out."""
        (height, width), (batch, channels) = self.config.patch_size, pixels.shape[:2]
        rows, columns = patch_grid(self.config.input_image_size, self.config.patch_size)
        whole = pixels[:, :, : rows * height, : columns * width]
        blocks = whole.reshape(batch, channels, rows, height, columns, width)
        return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    def _positions(self) -> Float32[Array, "1 positions hidden_size"]:
        table = self.position_embeddings[...].astype(jnp.float32)
        old = patch_grid(self.config.image_size, self.config.patch_size)
        new = patch_grid(self.config.input_image_size, self.config.patch_size)
        if old == new:
            return table
        down, across = (bicubic(*sizes, antialias=self.antialias) for sizes in zip(old, new, strict=True))
        patches = jnp.einsum("rR,cC,RCh->rch", down, across, table[0, 1:].reshape(*old, -1))
        # Rounded as a table of the new size would be.
        patches = patches.reshape(1, -1, table.shape[2]).astype(self.position_embeddings.dtype)
        return jnp.concatenate([table[:, :1], patches.astype(jnp.float32)], axis=1)


def bicubic(old: int, new: int, *, antialias: bool) -> Float32[np.ndarray, "new old"]:
    """The matrix that interpolates `old` equidistant values to `new`, both ends being the values' outer edges.

    Cubic convolution (Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981, eq. 4), as torch's
    `interpolate` has it: with a = -0.75 and the outer values repeated; with `antialias` with a = -0.5, stretched where
    there are fewer values, and normalised over those that exist.
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    if antialias:
        weights = _cubic((at[:, None] - np.arange(old)) / max(old / new, 1.0), -0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    weights = _cubic(at[:, None] - np.arange(-2, old + 2), -0.75)
    inside = weights[:, 2:-2].copy()
    inside[:, 0] += weights[:, :2].sum(axis=1)
    inside[:, -1] += weights[:, -2:].sum(axis=1)
    return inside.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def image_attention(config: ImageConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> SelfAttention:
    """The attention of these models' layers: over all tokens, with a bias in the output projection."""
    return SelfAttention(
        config,
        use_bias=config.qkv_bias,
        use_output_bias=True,
        rngs=rngs,
        param_dtype=param_dtype,
    )
