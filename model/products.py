"""Products of activations with weights, accumulated in float32: by XLA, or by the native kernel where that is faster.

A few rows, as in decoding, take as long as it takes to read the weights, which the kernel does as they lie in memory,
in whatever dtype. With int8 and int4 it rounds the rows to integers of 30 bits, which keeps what a float32 has. More
rows are XLA's, unless the weights are in a narrower dtype than the activations: the kernel then widens a panel at a
time, where XLA would make floats of them all. Of bfloat16 with bfloat16 either may be faster: the kernel multiplies as
fast as in float32, XLA faster where the processor multiplies bfloat16 and slower elsewhere. Where activations are to be
rounded (`activations`), more rows and int8 are multiplied as integers; XLA multiplies the same numbers as floats.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int, Shaped

from .. import kernels
from . import panels
from .activations import round_activations

FEW_ROWS = 4
"""Rows up to which the native kernel multiplies weights as they lie."""
_LEAST_ROWS = 8
"""Rows of a bfloat16 product in XLA, at least: what processors with tiles want, too."""
_PANEL = 256
"""Output features whose weights are floats at a time, in XLA."""

Weight = Shaped[Array, "in_features _"] | panels.Panels
"""[in_features, out_features], in the dtype of the activations or bfloat16, or panels of int8 or int4 with scales."""
Shape = tuple[int, int]
"""Input and output features of a weight."""
Scale = Float32[Array, "_ _"] | BFloat16[Array, "_ _"]
"""[groups of input features, out_features]: what the integers of a group are multiplied by; bfloat16 with int4."""
_in_kernel: ContextVar[frozenset[Shape] | None] = ContextVar("_in_kernel", default=None)


@contextmanager
def in_kernel(shapes: Collection[Shape]) -> Iterator[None]:
    """Inside, of many rows in bfloat16, products with weights of these shapes are the kernel's, and others XLA's.

    Outside, all are the kernel's on a processor that does not multiply bfloat16, and none on others.
    """
    token = _in_kernel.set(frozenset(shapes))
    try:
        yield
    finally:
        _in_kernel.reset(token)


def multiply(x: Float[Array, "*rows in_features"], weight: Weight) -> Float32[Array, "*rows _"]:
    """`x @ weight`."""
    return multiply_all(x, [weight], [None])[0]


def multiply_all(
    x: Float[Array, "*rows in_features"], weights: Sequence[Weight], scales: Sequence[Scale | None], levels: int = 0
) -> list[Float32[Array, "*rows _"]]:
    """`x @ (weight * scale)` for each weight, in one call of the native kernel for those that it computes.

    Where a weight is int8, more than `FEW_ROWS` rows are rounded to integers of at most `levels`, if that is not 0.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    pairs = list(zip(weights, scales, strict=True))
    native = [pair for pair in pairs if _native(flat, pair[0])]
    computed = iter(_all_in_kernel(flat, native, levels) if native else ())
    products = [
        next(computed) if _native(flat, weight) else _in_xla(flat, weight, scale, levels) for weight, scale in pairs
    ]
    return [product.reshape(*x.shape[:-1], product.shape[1]) for product in products]


def multiply_by_one_of(
    x: Float[Array, "*rows in_features"],
    number: Int[Array, ""],
    weights: Sequence[Weight],
    scales: Sequence[Scale | None],
    levels: int = 0,
) -> Float32[Array, "*rows _"]:
    """`x @ (weight * scale)` for the weight of that number among several of one shape and dtype.

    The native kernel reads that weight where it lies, and none of the others; XLA makes a copy of it first.
    """
    pairs = list(zip(weights, scales, strict=True))
    if _native(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weights[0]):
        return lax.switch(number, [partial(_multiply_by, pair, levels) for pair in pairs], x)
    # A product in each branch would be compiled as often as there are weights.
    return _multiply_by(lax.switch(number, [partial(_same, pair) for pair in pairs]), levels, x)


def multiply_transposed(
    x: Float[Array, "*rows in_features"], table: Float[Array, "out_features in_features"]
) -> Float32[Array, "*rows out_features"]:
    """`x @ table.T`."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if flat.shape[0] <= FEW_ROWS and _native(flat, table):
        (product,) = _call(flat, [table], [table.shape[0]], transposed=True)
    else:
        product = _of_floats(flat, table, axis=1)
    return product.reshape(*x.shape[:-1], table.shape[0])


def _multiply_by(
    pair: tuple[Weight, Scale | None], levels: int, x: Float[Array, "*rows in_features"]
) -> Float32[Array, "*rows _"]:
    weight, scale = pair
    return multiply_all(x, [weight], [scale], levels)[0]


def _same(pair: tuple[Weight, Scale | None]) -> tuple[Weight, Scale | None]:
    return pair


def _native(x: Float[Array, "rows in_features"], weight: Weight | Float[Array, "out_features in_features"]) -> bool:
    """Whether the kernel multiplies by a weight."""
    if x.dtype not in (jnp.float32, jnp.bfloat16) or not kernels.enabled():
        return False
    if x.shape[0] <= FEW_ROWS or weight.dtype.itemsize < x.dtype.itemsize:
        return True
    if not x.dtype == weight.dtype == jnp.bfloat16:
        return False
    shapes = _in_kernel.get()
    return weight.shape in shapes if shapes is not None else not kernels.multiplies_bfloat16()


def _all_in_kernel(
    x: Float[Array, "rows in_features"], weights: Sequence[tuple[Weight, Scale | None]], levels: int
) -> list[Float32[Array, "rows _"]]:
    scales = [scale for _, scale in weights if scale is not None]
    features = [weight.shape[1] if scale is None else scale.shape[1] for weight, scale in weights]
    return _call(x, [*(weight for weight, _ in weights), *scales], features, transposed=False, levels=levels)


def _call(
    x: Float[Array, "rows in_features"],
    arrays: Sequence[Array],
    features: Sequence[int],
    *,
    transposed: bool,
    levels: int = 0,
) -> list[Float32[Array, "rows _"]]:
    results = [jax.ShapeDtypeStruct((x.shape[0], count), jnp.float32) for count in features]
    call = jax.ffi.ffi_call(kernels.LINEAR, results)
    return list(call(x, *arrays, transposed=transposed, levels=np.int64(levels)))


def _in_xla(
    x: Float[Array, "rows in_features"], weight: Weight, scale: Scale | None, levels: int
) -> Float32[Array, "rows _"]:
    if scale is None:
        return _of_floats(x, weight, axis=0)
    if levels and x.shape[0] > FEW_ROWS:
        x = round_activations(x, scale.shape[0], levels)
    return _of_panels(x, weight, scale)


def _of_floats(x: Float[Array, "rows k"], weight: Array, axis: int) -> Float32[Array, "rows out_features"]:
    """The product with the given axis of a weight.

    XLA's bfloat16 product of a single row makes a float32 copy of the whole weight at each call, which takes 15 times
    as long as the product of a few rows: so there are a few.
    """
    if weight.dtype.itemsize < x.dtype.itemsize:
        return _by_panels(x, weight, axis)
    rows = x.shape[0]
    if x.dtype == jnp.bfloat16 and rows < _LEAST_ROWS:
        x = jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0)))
    return _product(x, weight, axis)[:rows]


def _product(x: Float[Array, "rows k"], weight: Array, axis: int) -> Float32[Array, "rows out_features"]:
    return lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _by_panels(x: Float[Array, "rows k"], weight: Array, axis: int) -> Float32[Array, "rows out_features"]:
    """The product, some output features at a time.

    A product with the whole weight would make floats of it first, and XLA makes those of all layers at once.
    """
    features = weight.shape[1 - axis]
    width = min(_PANEL, features)

    def product_at(start: Array) -> Array:
        panel = lax.dynamic_slice_in_dim(weight, start, width, axis=1 - axis)
        return _product(x, panel.astype(x.dtype), axis)

    return _some_at_a_time(x.shape[0], features, width, product_at)


def _of_panels(
    x: Float[Array, "rows in_features"], weight: panels.Panels, scale: Scale
) -> Float32[Array, "rows out_features"]:
    """The same of panels. In float32: times a scale, an integer is no longer exact in bfloat16."""
    features = weight.shape[0] * panels.OUTPUTS
    width = min(_PANEL, features)
    scales = jnp.pad(scale, ((0, 0), (0, features - scale.shape[1])))
    wide = x.astype(jnp.float32)

    def product_at(start: Array) -> Array:
        some = lax.dynamic_slice_in_dim(weight, start // panels.OUTPUTS, width // panels.OUTPUTS)
        kernel = panels.unpack(some, x.shape[1]).astype(jnp.float32)
        of_panel = lax.dynamic_slice_in_dim(scales, start, width, axis=1).astype(jnp.float32)
        return _product(wide, kernel * jnp.repeat(of_panel, kernel.shape[0] // scale.shape[0], axis=0), 0)

    return _some_at_a_time(x.shape[0], features, width, product_at)[:, : scale.shape[1]]


def _some_at_a_time(
    rows: int, features: int, width: int, product_at: Callable[[Array], Array]
) -> Float32[Array, "rows out_features"]:
    """The product whose `width` columns from any column on `product_at` gives."""

    def step(index: Array, result: Array) -> Array:
        # The last panel overlaps the one before where they do not divide the features.
        start = jnp.minimum(index * width, features - width)
        return lax.dynamic_update_slice_in_dim(result, product_at(start), start, axis=1)

    return lax.fori_loop(0, -(-features // width), step, jnp.zeros((rows, features), jnp.float32))
