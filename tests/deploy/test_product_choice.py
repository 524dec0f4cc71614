"""Who multiplies bfloat16: measured for each shape of a model's weights, and compiled so."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from iceformer import kernels
from iceformer.deploy.manifest import ProductRow
from iceformer.deploy.product_choice import kernel_shapes, measure_products
from iceformer.model.modules import Linear
from iceformer.model.products import in_kernel, multiply_all

needs_kernels = pytest.mark.skipif(not kernels.enabled(), reason="there are no native kernels")


class Pair(nnx.Module):
    def __init__(self, dtype: str) -> None:
        rngs = nnx.Rngs(0)
        self.up = Linear(8, 16, use_bias=False, rngs=rngs, param_dtype=dtype)
        self.also_up = Linear(8, 16, use_bias=True, rngs=rngs, param_dtype=dtype)
        self.down = Linear(16, 8, use_bias=False, rngs=rngs, param_dtype=dtype)


@needs_kernels
def test_each_shape_is_timed_once() -> None:
    rows = measure_products(Pair("bfloat16"))
    assert sorted((row.in_features, row.out_features) for row in rows) == [(8, 16), (16, 8)]
    assert all(row.kernel_seconds > 0 and row.xla_seconds > 0 for row in rows)


def test_other_dtypes_leave_no_choice() -> None:
    assert measure_products(Pair("float32")) == ()


def test_without_kernels_there_is_nothing_to_time() -> None:
    with kernels.disabled():
        assert measure_products(Pair("bfloat16")) == ()


def test_the_faster_one_is_chosen() -> None:
    rows = [ProductRow(8, 16, 256, 1.0, 2.0), ProductRow(16, 8, 256, 2.0, 1.0)]
    assert kernel_shapes(rows) == {(8, 16)}


@needs_kernels
@pytest.mark.parametrize(("shapes", "calls"), [((), 0), (((8, 16),), 1), (((8, 24),), 1), (((8, 16), (8, 24)), 1)])
def test_shapes_decide_who_multiplies(shapes: tuple[tuple[int, int], ...], calls: int) -> None:
    x = jnp.ones((32, 8), jnp.bfloat16)
    weights = [jnp.ones((8, outputs), jnp.bfloat16) for outputs in (16, 24)]

    def products(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        return multiply_all(x, weights, [None, None])

    with in_kernel(shapes):
        lowered = jax.jit(products).lower(x, weights)
    assert lowered.as_text().count(kernels.LINEAR) == calls
    assert [result.tolist() for result in lowered.compile()(x, weights)] == [[[8.0] * 16] * 32, [[8.0] * 24] * 32]


@needs_kernels
def test_an_integer_beside_a_float_stays_the_kernels() -> None:
    x = jnp.ones((32, 8), jnp.bfloat16)
    int8, scale = jnp.ones((1, 2, 16, 4), jnp.int8), jnp.ones((1, 16), jnp.float32)

    def products(x: jax.Array, int8: jax.Array, scale: jax.Array, bfloat16: jax.Array) -> list[jax.Array]:
        return multiply_all(x, [int8, bfloat16, int8], [scale, None, scale])

    with in_kernel(()):
        lowered = jax.jit(products).lower(x, int8, scale, jnp.full((8, 4), 2, jnp.bfloat16))
    assert lowered.as_text().count(kernels.LINEAR) == 1
    results = lowered.compile()(x, int8, scale, jnp.full((8, 4), 2, jnp.bfloat16))
    assert [result.tolist() for result in results] == [[[8.0] * 16] * 32, [[16.0] * 4] * 32, [[8.0] * 16] * 32]
