"""The modules that layers are made of: linear products, embeddings, norms, MLPs.

Activations have the parameters' dtype; products accumulate in float32, the rest is computed in it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from . import panels
from .products import Weight, multiply_all, multiply_transposed

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_accurate": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_python": partial(jax.nn.gelu, approximate=False),
    "gelu_python_tanh": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activation functions by the name that a config's `hidden_act` gives."""

_initial = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """`x @ kernel + bias`, or `x @ (kernel * scale) + bias` where the kernel is int8 or int4, in panels, with a scale
    for each group of inputs and each output.

    Attributes:
        levels: what x is rounded to there: integers of at most this, or not at all if it is 0 (`activations.LEVELS`).
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool, rngs: nnx.Rngs, param_dtype: DTypeLike
    ) -> None:
        self.kernel = nnx.Param(_initial(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.scale: nnx.Param | None = nnx.data(None)
        self.levels = 0

    @classmethod
    def of(cls, kernel: Float[Array, "in_features out_features"]) -> "Linear":
        """The layer with a kernel and without a bias."""
        linear = Linear(0, 0, use_bias=False, rngs=nnx.Rngs(0), param_dtype=kernel.dtype)
        linear.kernel = nnx.Param(kernel)
        return linear

    @property
    def weight(self) -> Weight:
        """The kernel, as products take it."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "*rows in_features"]) -> Float[Array, "*rows out_features"]:
        return self.in_float32(x).astype(x.dtype)

    def in_float32(self, x: Float[Array, "*rows in_features"]) -> Float32[Array, "*rows out_features"]:
        """The same without rounding the result to x's dtype."""
        return project(x, self)[0]


Observer = Callable[[tuple[nnx.Module, ...], Array], None]
"""Is given linear layers, or experts, and the input that they take together."""
_observer: ContextVar[Observer | None] = ContextVar("_observer", default=None)


@contextmanager
def observing_inputs(observe: Observer) -> Iterator[None]:
    """Within it, `observe` is given what linear layers and experts take, while the function is traced."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def show_input(modules: tuple[nnx.Module, ...], x: Float[Array, "*rows in_features"]) -> None:
    """Gives the observer, if there is one, what these take."""
    observe = _observer.get()
    if observe is not None:
        observe(modules, x)


def project(x: Float[Array, "*rows in_features"], *layers: Linear) -> list[Float32[Array, "*rows _"]]:
    """What several linear layers make of the same input, in float32."""
    show_input(layers, x)
    scales = [None if layer.scale is None else layer.scale[...] for layer in layers]
    levels = max(layer.levels for layer in layers)
    products = multiply_all(x, [layer.weight for layer in layers], scales, levels)
    return [
        product if layer.bias is None else product + layer.bias[...].astype(jnp.float32)
        for product, layer in zip(products, layers, strict=True)
    ]


class Convolution(Linear):
    """The product of a convolution, `windows @ kernel + bias`, over windows that the caller cuts.

    The kernel is [*window, out_features], or that of a linear layer where it is int8.

    Args:
        window: what a window is made of, e.g. (channels, height, width).
        out_features: channels of the result.
    """

    def __init__(self, window: tuple[int, ...], out_features: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        super().__init__(math.prod(window), out_features, use_bias=True, rngs=rngs, param_dtype=param_dtype)
        self.kernel = nnx.Param(self.kernel[...].reshape(*window, out_features))

    @property
    def weight(self) -> Weight:
        """The kernel, as products take it: of flat windows."""
        kernel = self.kernel[...]
        return kernel.reshape(-1, kernel.shape[-1]) if self.scale is None else kernel

    def __call__(self, windows: Float[Array, "*rows in_features"]) -> Float32[Array, "*rows out_features"]:
        """The result in float32, for windows that are flat and in any dtype."""
        assert self.bias is not None
        return self.in_float32(windows.astype(self.bias.dtype))


class Embedding(nnx.Module):
    """A table of vectors by token id. An id outside of the table gives NaN.

    Attributes:
        embedding: the table, [num_embeddings, features], or int8 panels of it as the kernel of an output layer.
        scale: of that, [groups of features, num_embeddings]; None without int8.
        dtype: of the vectors; the table may be narrower.
    """

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.embedding = nnx.Param(_initial(rngs.params(), (num_embeddings, features), param_dtype))
        self.scale: nnx.Param | None = nnx.data(None)
        self.features, self.dtype = features, jnp.dtype(param_dtype)

    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens features"]:
        if self.scale is None:
            return jnp.take(self.embedding[...], ids, axis=0, mode="fill").astype(self.dtype)
        scales = jnp.moveaxis(jnp.take(self.scale[...], ids, axis=1, mode="fill"), 0, -1)
        weights = panels.outputs(self.embedding[...], ids, self.features)
        return (weights * jnp.repeat(scales, self.features // scales.shape[-1], axis=-1)).astype(self.dtype)

    def logits(self, x: Float[Array, "*rows features"]) -> Float32[Array, "*rows num_embeddings"]:
        """`x @ table.T`: what a model with tied embeddings has for an output layer."""
        if self.scale is None:
            return multiply_transposed(x, self.embedding[...])
        return multiply_all(x, [self.embedding[...]], [self.scale[...]])[0]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * (weight_offset + scale)` over the last dimension.

    The offset is 0, or 1 in Gemma models, whose checkpoints hold weights around 0.
    """

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike, weight_offset: float = 0.0) -> None:
        self.scale = nnx.Param(jnp.full((features,), 1 - weight_offset, param_dtype))
        self.epsilon, self.weight_offset = epsilon, weight_offset

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.epsilon)
        return (normed * (self.weight_offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias` over the last dimension.

    `features` may give dimensions before the last too, for parameters that differ along them, as from head to head.
    """

    def __init__(
        self, features: int | tuple[int, ...], *, epsilon: float, param_dtype: DTypeLike, use_bias: bool = True
    ) -> None:
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)
        return (normed if self.bias is None else normed + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@runtime_checkable
class MLPSizes(Protocol):
    """What an MLP takes from a model's configuration."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(
        self, sizes: MLPSizes, *, hidden_act: str, use_bias: bool, rngs: nnx.Rngs, param_dtype: DTypeLike
    ) -> None:
        linear = partial(Linear, use_bias=use_bias, rngs=rngs, param_dtype=param_dtype)
        self.gate_proj = linear(sizes.hidden_size, sizes.intermediate_size)
        self.up_proj = linear(sizes.hidden_size, sizes.intermediate_size)
        self.down_proj = linear(sizes.intermediate_size, sizes.hidden_size)
        self.hidden_act = hidden_act

    def __call__(self, x: Float[Array, "*rows hidden_size"]) -> Float[Array, "*rows hidden_size"]:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj((ACTIVATIONS[self.hidden_act](gate) * up).astype(x.dtype))


class MLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self, sizes: MLPSizes, *, hidden_act: str, use_bias: bool, rngs: nnx.Rngs, param_dtype: DTypeLike
    ) -> None:
        linear = partial(Linear, use_bias=use_bias, rngs=rngs, param_dtype=param_dtype)
        self.up_proj = linear(sizes.hidden_size, sizes.intermediate_size)
        self.down_proj = linear(sizes.intermediate_size, sizes.hidden_size)
        self.hidden_act = hidden_act

    def __call__(self, x: Float[Array, "*rows hidden_size"]) -> Float[Array, "*rows hidden_size"]:
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.up_proj.in_float32(x)).astype(x.dtype))
