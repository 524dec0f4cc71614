"""Products of activations with weights, accumulated in float32: by XLA, or by the native kernel where that is faster.

A few rows, as in decoding, take as long as it takes to read the weights, which the kernel does as they lie in memory,
in whatever dtype. More rows are XLA's, unless the weights are in a narrower dtype than the activations: the kernel then
widens a panel at a time, where XLA would make floats of them all.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

from .. import kernels

FEW_ROWS = 4
"""Rows up to which the native kernel multiplies weights as they lie."""
_LEAST_ROWS = 8
"""Rows of a bfloat16 product in XLA, at least: what processors with tiles want, too."""
_PANEL = 256
"""Output features whose weights are floats at a time, in XLA."""

Weight = Shaped[Array, "in_features _"]
"""[in_features, out_features], in the dtype of the activations, bfloat16, or int8 with scales."""
Scale = Float32[Array, "groups _"]
"""[groups of input features, out_features]: what the int8 of a group are multiplied by."""


def multiply(x: Float[Array, "*rows in_features"], weight: Weight) -> Float32[Array, "*rows _"]:
    """`x @ weight`."""
    return multiply_all(x, [weight], [None])[0]


def multiply_all(
    x: Float[Array, "*rows in_features"], weights: Sequence[Weight], scales: Sequence[Scale | None]
) -> list[Float32[Array, "*rows _"]]:
    """`x @ (weight * scale)` for each weight, in one call of the native kernel where that computes them all."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if all(_native(flat, weight.dtype) for weight in weights):
        products = _call(flat, weights, [scale for scale in scales if scale is not None], transposed=False)
    else:
        products = [_in_xla(flat, weight, scale) for weight, scale in zip(weights, scales, strict=True)]
    return [product.reshape(*x.shape[:-1], product.shape[1]) for product in products]


def multiply_transposed(
    x: Float[Array, "*rows in_features"], table: Float[Array, "out_features in_features"]
) -> Float32[Array, "*rows out_features"]:
    """`x @ table.T`."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if flat.shape[0] <= FEW_ROWS and _native(flat, table.dtype):
        (product,) = _call(flat, [table], (), transposed=True)
    else:
        product = _in_xla(flat, table, None, axis=1)
    return product.reshape(*x.shape[:-1], table.shape[0])


def _native(x: Float[Array, "rows in_features"], dtype: jnp.dtype) -> bool:
    narrower = dtype.itemsize < x.dtype.itemsize
    return x.dtype in (jnp.float32, jnp.bfloat16) and kernels.enabled() and (narrower or x.shape[0] <= FEW_ROWS)


def _call(
    x: Float[Array, "rows in_features"], weights: Sequence[Array], scales: Sequence[Array], *, transposed: bool
) -> list[Float32[Array, "rows _"]]:
    features = [weight.shape[0 if transposed else 1] for weight in weights]
    results = [jax.ShapeDtypeStruct((x.shape[0], count), jnp.float32) for count in features]
    return jax.ffi.ffi_call(kernels.LINEAR, results)(x, *weights, *scales, transposed=transposed)


def _in_xla(
    x: Float[Array, "rows k"], weight: Array, scale: Scale | None, axis: int = 0
) -> Float32[Array, "rows out_features"]:
    """The product with the given axis of a weight.

    XLA's bfloat16 product of a single row makes a float32 copy of the whole weight at each call, which takes 15 times
    as long as the product of a few rows: so there are a few.
    """
    if weight.dtype.itemsize < x.dtype.itemsize:
        return _by_panels(x, weight, scale, axis)
    rows = x.shape[0]
    if x.dtype == jnp.bfloat16 and rows < _LEAST_ROWS:
        x = jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0)))
    return _product(x, weight, axis)[:rows]


def _product(x: Float[Array, "rows k"], weight: Array, axis: int) -> Float32[Array, "rows out_features"]:
    return lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _by_panels(
    x: Float[Array, "rows k"], weight: Array, scale: Scale | None, axis: int
) -> Float32[Array, "rows out_features"]:
    """The product, some output features at a time.

    A product with the whole weight would make floats of it first, and XLA makes those of all layers at once.
    """
    features = weight.shape[1 - axis]
    width = min(_PANEL, features)

    def step(index: Array, result: Array) -> Array:
        # The last panel overlaps the one before where they do not divide the features.
        start = jnp.minimum(index * width, features - width)
        panel = lax.dynamic_slice_in_dim(weight, start, width, axis=1 - axis)
        if scale is None:
            product = _product(x, panel.astype(x.dtype), axis)
        else:
            # In float32: times a scale, an int8 is no longer exact in bfloat16.
            scales = lax.dynamic_slice_in_dim(scale, start, width, axis=1)
            scaled = panel.astype(jnp.float32) * jnp.repeat(scales, panel.shape[0] // scale.shape[0], axis=0)
            product = _product(x.astype(jnp.float32), scaled, axis)
        return lax.dynamic_update_slice_in_dim(result, product, start, axis=1)

    return lax.fori_loop(0, -(-features // width), step, jnp.zeros((x.shape[0], features), jnp.float32))
