"""Who multiplies bfloat16 with the weights of a model: the native kernel or XLA, whichever is faster on this machine.

Its activations are bfloat16, too. A call with more than a few rows is what is timed.
"""

import itertools
import statistics
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from .. import kernels
from ..model.modules import Linear
from ..model.products import Shape, in_kernel, multiply
from .manifest import ProductRow

_ROWS = 256
"""Of a timed product."""
_ROUNDS = 5


def kernel_shapes(rows: Iterable[ProductRow]) -> frozenset[Shape]:
    """The shapes of weights that are the kernel's, as `in_kernel` takes them."""
    return frozenset((row.in_features, row.out_features) for row in rows if row.in_kernel)


def measure_products(model: nnx.Module) -> tuple[ProductRow, ...]:
    """Times a product with each shape of a model's bfloat16 weights by the kernel and by XLA, in turn; nothing where
    there is no kernel."""
    linears = [node for _, node in nnx.iter_graph(model) if isinstance(node, Linear)]
    shapes = dict.fromkeys(linear.weight.shape for linear in linears if linear.kernel.dtype == jnp.bfloat16)
    return tuple(_measured(shape) for shape in shapes) if kernels.enabled() else ()


def _measured(shape: Shape) -> ProductRow:
    x, weight = jnp.ones((_ROWS, shape[0]), jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
    calls: list[jax.stages.Compiled] = []
    for shapes in ((shape,), ()):
        with in_kernel(shapes):
            calls.append(jax.jit(lambda x, weight: multiply(x, weight)).lower(x, weight).compile())
    times: list[list[float]] = [[], []]
    for _, (call, seconds) in itertools.product(range(_ROUNDS), zip(calls, times, strict=True)):
        start = time.perf_counter()
        jax.block_until_ready(call(x, weight))
        seconds.append(time.perf_counter() - start)
    # The first of each is not counted.
    in_the_kernel, in_xla = (round(statistics.median(seconds[1:]), 6) for seconds in times)
    return ProductRow(*shape, _ROWS, in_the_kernel, in_xla)
