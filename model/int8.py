"""int8 weights: linear layers whose kernel is int8 with one scale for each output channel.

Weights are rounded, activations are not: an int8 weight is a float without loss, so that a product is exact but for the
order of its sums. Embeddings, tied output layers, norms and biases keep their dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from .. import kernels
from ..attention.ops import matmul
from .modules import Linear

_LARGEST = 127
_PANEL = 256
"""Output channels whose weights are floats at a time, in XLA."""


class Int8Linear(nnx.Module):
    """`x @ (kernel * scale) + bias`."""

    def __init__(
        self,
        kernel: Int8[Array, "in_features out_features"],
        scale: Float32[Array, " out_features"],
        bias: Float[Array, " out_features"] | None,
    ) -> None:
        self.kernel = nnx.Param(kernel)
        self.scale = nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)

    @classmethod
    def of(cls, linear: Linear) -> "Int8Linear":
        """The layer with its kernel rounded."""
        kernel, scale = quantize_kernel(np.asarray(linear.kernel[...], np.float32))
        bias = None if linear.bias is None else linear.bias[...]
        return cls(jnp.asarray(kernel), jnp.asarray(scale), bias)

    def __call__(self, x: Float[Array, "*rows in_features"]) -> Float[Array, "*rows out_features"]:
        return self.in_float32(x).astype(x.dtype)

    def in_float32(self, x: Float[Array, "*rows in_features"]) -> Float32[Array, "*rows out_features"]:
        """The same without rounding the result to x's dtype."""
        product = int8_matmul(x.reshape(-1, x.shape[-1]), self.kernel[...], self.scale[...])
        product = product.reshape(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias[...].astype(jnp.float32)


def quantize(model: nnx.Module) -> nnx.Module:
    """The model with an `Int8Linear` in place of every `Linear` that is an attribute of a module or stands in a list.

    Everything else is shared with the given model, which stays as it is.
    """
    quantized = nnx.merge(*nnx.split(model))
    layers: dict[int, Int8Linear] = {}

    def layer(linear: Linear) -> Int8Linear:
        # A layer that stands in two places is still one layer.
        return layers.setdefault(id(linear), layers.get(id(linear)) or Int8Linear.of(linear))

    nodes = [node for _, node in nnx.iter_graph(quantized)]
    for node in nodes:
        if isinstance(node, nnx.List):
            for index, child in enumerate(node):
                if isinstance(child, Linear):
                    node[index] = layer(child)
        elif isinstance(node, nnx.Module):
            for name, child in list(vars(node).items()):
                if isinstance(child, Linear):
                    setattr(node, name, layer(child))
    return quantized


def quantize_kernel(
    kernel: Float32[np.ndarray, "in_features out_features"],
) -> tuple[Int8[np.ndarray, "in_features out_features"], Float32[np.ndarray, " out_features"]]:
    """int8 and scales with `|kernel - int8 * scale| <= scale / 2`, the largest weight of each output channel being 127.

    Symmetric: 0 stays 0. A channel of zeros has scale 1.
    """
    # A denormal scale would be 0 where the product is computed.
    largest = np.abs(kernel).max(axis=0, initial=0.0)
    scale = np.where(largest > _LARGEST * np.finfo(np.float32).tiny, largest / np.float32(_LARGEST), np.float32(1))
    rounded = np.clip(np.rint(kernel / scale), -_LARGEST, _LARGEST)
    return rounded.astype(np.int8), scale.astype(np.float32)


def int8_matmul(
    x: Float[Array, "rows in_features"],
    kernel: Int8[Array, "in_features out_features"],
    scale: Float32[Array, " out_features"],
) -> Float32[Array, "rows out_features"]:
    """`(x @ kernel) * scale` in float32, by the native kernel where there is one."""
    if x.dtype in (jnp.float32, jnp.bfloat16) and kernels.enabled():
        result = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32)
        return jax.ffi.ffi_call(kernels.INT8_LINEAR, result)(x, kernel, scale)
    return _matmul_by_panels(x, kernel) * scale


def _matmul_by_panels(
    x: Float[Array, "rows in_features"], kernel: Int8[Array, "in_features out_features"]
) -> Float32[Array, "rows out_features"]:
    """`x @ kernel`, some output channels at a time.

    A product with the whole kernel would make floats of it first, and XLA makes those of all layers at once.
    """
    channels = kernel.shape[1]
    width = min(_PANEL, channels)

    def step(index: Array, result: Array) -> Array:
        # The last panel overlaps the one before where they do not divide the channels.
        start = jnp.minimum(index * width, channels - width)
        panel = lax.dynamic_slice_in_dim(kernel, start, width, axis=1).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(result, matmul(x, panel), start, axis=1)

    return lax.fori_loop(0, -(-channels // width), step, jnp.zeros((x.shape[0], channels), jnp.float32))
