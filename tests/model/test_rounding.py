"""Rounded weights: the rounding, the layer, and which layers of a model take it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from iceformer import kernels
from iceformer.model.modules import Convolution, Embedding, GatedMLP, Linear, RMSNorm
from iceformer.model.panels import unpack
from iceformer.model.registry import build
from iceformer.model.rounding import GROUP, form_of, quantize_kernel, round_weights

from ..few import few


@pytest.fixture(autouse=True, scope="module", params=["xla", "kernels"])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """The form that the product takes."""
    jax.clear_caches()
    if request.param == "kernels":
        if not kernels.register():
            pytest.skip("the native kernels are not built")
        yield
    else:
        with kernels.disabled():
            yield


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        # Without subnormal numbers, which XLA has switched off for the process.
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        | st.floats(-1, 1, width=32, allow_subnormal=False),
    )
)
def test_every_weight_is_within_half_a_step(kernel: np.ndarray) -> None:
    rounded, scale = quantize_kernel(kernel)
    assert (rounded.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (1, kernel.shape[1]))
    exact, step = kernel.astype(np.float64), scale.astype(np.float64)
    assert (np.abs(exact - rounded * step) <= step * (0.5 + 1e-5)).all()
    assert (scale > 0).all()
    assert rounded.min(initial=0) >= -127
    assert (rounded[kernel == 0] == 0).all()
    # The largest weight of a channel uses the whole range, unless it is as good as 0.
    largest = np.abs(kernel).max(axis=0)
    assert (np.abs(rounded.astype(int)).max(axis=0)[largest > 1e-30] == 127).all()


def test_every_group_of_inputs_has_a_scale_of_its_own() -> None:
    kernel = np.random.default_rng(0).standard_normal((3 * GROUP, 5)).astype(np.float32)
    kernel[:GROUP] *= 100
    rounded, scale = quantize_kernel(kernel)
    assert scale.shape == (3, 5)
    for group, of_group in enumerate(np.split(kernel, 3)):
        alone, its_scale = quantize_kernel(of_group)
        np.testing.assert_array_equal(rounded[group * GROUP : (group + 1) * GROUP], alone)
        np.testing.assert_array_equal(scale[group : group + 1], its_scale)
    # There are no whole groups of 65 inputs.
    assert quantize_kernel(kernel[: GROUP + 1])[1].shape == (1, 5)


@pytest.mark.parametrize(
    ("dtype", "shape", "use_bias"),
    [
        pytest.param("float32", (24,), False, marks=pytest.mark.slow),
        pytest.param("float32", (1, 1, 24), True, marks=pytest.mark.slow),
        pytest.param("float32", (3, 7, 24), False, marks=pytest.mark.slow),
        pytest.param("float32", (128,), False, marks=pytest.mark.slow),
        ("float32", (3, 7, 128), True),
        ("bfloat16", (24,), True),
        pytest.param("bfloat16", (1, 1, 24), False, marks=pytest.mark.slow),
        pytest.param("bfloat16", (3, 7, 24), True, marks=pytest.mark.slow),
        pytest.param("bfloat16", (1, 128), True, marks=pytest.mark.slow),
        ("bfloat16", (3, 7, 128), False),
        pytest.param("float16", (24,), False, marks=pytest.mark.slow),
        pytest.param("float16", (1, 1, 24), True, marks=pytest.mark.slow),
        ("float16", (3, 7, 24), True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("weights", "steps"), [("int8", 254), ("int4", 14)])
def test_layer_is_a_linear_layer_with_the_rounded_weights(
    dtype: str, shape: tuple[int, ...], use_bias: bool, weights: str, steps: int
) -> None:
    rng = np.random.default_rng(0)
    features = shape[-1]
    linear = Linear(features, 600, use_bias=use_bias, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))
    if linear.bias is not None:
        linear.bias[...] = jnp.asarray(rng.standard_normal(600), dtype)
    layer = round_weights(linear, weights)
    scale = np.asarray(layer.scale[...], np.float64)
    kernel = np.asarray(unpack(layer.kernel[...], features), np.float64)[:, :600]
    kernel *= np.repeat(scale, features // len(scale), axis=0)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    expected = np.asarray(x, np.float64) @ kernel
    expected += np.asarray(linear.bias[...], np.float64) if linear.bias is not None else 0.0
    product = layer.in_float32(x)
    assert (product.dtype, product.shape) == (jnp.float32, (*shape[:-1], 600))
    np.testing.assert_allclose(product, expected, atol=1e-5)
    assert layer(x).dtype == x.dtype
    np.testing.assert_array_equal(layer(x), product.astype(dtype))
    # Near to the layer before: half of steps as small as the largest weight, 0.1, is in so many.
    np.testing.assert_allclose(linear.in_float32(x), product, atol=features * 0.1 / steps * float(jnp.abs(x).max()))


class Model(nnx.Module):
    """Linear layers as an attribute, in a module, in a list, one twice, beside what stays as it is."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = Embedding(10, 8, rngs=rngs, param_dtype=jnp.float32)
        self.norm = RMSNorm(8, epsilon=1e-6, param_dtype=jnp.float32)
        self.first = Linear(8, 8, use_bias=True, rngs=rngs, param_dtype=jnp.float32)
        self.again = self.first
        self.none = None
        sizes: Any = SimpleNamespace(hidden_size=8, intermediate_size=16)
        made: dict[str, Any] = {"use_bias": False, "rngs": rngs, "param_dtype": jnp.float32}
        mlps = [GatedMLP(sizes, hidden_act="silu", **made) for _ in range(2)]
        self.v_proj = Linear(8, 8, use_bias=False, rngs=rngs, param_dtype=jnp.float32)
        self.layers = nnx.List([*mlps, Linear(8, 4, use_bias=False, rngs=rngs, param_dtype=jnp.float32)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        hidden = self.v_proj(self.again(self.first(self.norm(self.embed(ids)))))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("form", few(["xla", "kernels"], ["kernels"]), indirect=True)
def test_int4_is_for_the_layers_of_a_stack() -> None:
    rounded = round_weights(Model(), "int4")
    found = {path: node.kernel.dtype for path, node in nnx.iter_graph(rounded) if isinstance(node, Linear)}
    inside = {path: dtype for path, dtype in found.items() if path[0] == "layers"}
    assert set(inside.values()) == {jnp.dtype(jnp.uint8)}
    assert {dtype for path, dtype in found.items() if path not in inside} == {jnp.dtype(jnp.int8)}
    model, ids = Model(), jnp.arange(10)[None]
    np.testing.assert_allclose(rounded(ids), model(ids), atol=0.6 * float(jnp.abs(model(ids)).max()))
    again = round_weights(rounded, "int4")
    assert again.first.kernel[...] is rounded.first.kernel[...]


@pytest.mark.parametrize(
    ("path", "forms"),
    [
        (("model", "layers", 3, "self_attn", "q_proj"), "int4 int8 bfloat16"),
        (("model", "layers", 3, "self_attn", "v_proj"), "int8 bfloat16 bfloat16"),
        (("layers", 0, "mlp", "gate_proj"), "int4 int8 bfloat16"),
        (("model", "layers", 0, "mlp", "gate"), "int8 int8 bfloat16"),
        (("lm_head",), "int8 int8 bfloat16"),
        (("head", "out"), "int8 int8 bfloat16"),
        ((), "int4 int8 bfloat16"),
    ],
)
def test_the_format_of_a_layer_follows_from_its_place(path: tuple[Any, ...], forms: str) -> None:
    assert [form_of(path, form) for form in ("int4", "int8", "bfloat16")] == forms.split()


def test_every_linear_layer_is_replaced_and_the_model_given_is_not() -> None:
    model = Model()
    ids = jnp.arange(10)[None]
    before = model(ids)
    rounded = round_weights(model, "int8")
    found = {path: node.kernel.dtype for path, node in nnx.iter_graph(rounded) if isinstance(node, Linear)}
    assert found.pop(("v_proj",)) == jnp.bfloat16
    assert list(found.values()) == [jnp.int8] * (1 + 2 * 3 + 1)
    assert isinstance(rounded, Model)
    assert rounded.first is rounded.again
    dtypes = {".".join(map(str, path)): leaf.dtype.name for path, leaf in nnx.to_flat_state(nnx.state(rounded))}
    assert {name for name, dtype in dtypes.items() if dtype == "int8"} == {
        name for name in dtypes if name.endswith("kernel") and name != "v_proj.kernel"
    }
    assert rounded.embed.embedding[...] is model.embed.embedding[...]
    np.testing.assert_array_equal(model(ids), before)
    assert not np.array_equal(rounded(ids), before)
    np.testing.assert_allclose(rounded(ids), before, atol=0.05 * float(jnp.abs(before).max()))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_convolution_is_the_product_of_windows_with_the_rounded_weights(dtype: str) -> None:
    rng = np.random.default_rng(0)
    layer = Convolution((3, 4, 8), 70, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))
    assert layer.bias is not None
    layer.bias[...] = jnp.asarray(rng.standard_normal(70), dtype)
    rounded = round_weights(layer, "int8", "int8")
    assert (layer.kernel.shape, rounded.kernel.dtype, rounded.scale.shape) == ((3, 4, 8, 70), jnp.int8, (1, 70))
    # What it takes is not rounded.
    assert rounded.levels == 0
    kernel = np.asarray(unpack(rounded.kernel[...], 96), np.float64)[:, :70] * np.asarray(
        rounded.scale[...], np.float64
    )
    windows = jnp.asarray(rng.standard_normal((2, 9, 96)), dtype)
    expected = np.asarray(windows, np.float64) @ kernel + np.asarray(layer.bias[...], np.float64)
    result = rounded(windows.astype(jnp.float32))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(result, layer(windows), atol=96 * 0.1 / 254 * 4)
    in_bfloat16 = round_weights(layer, "bfloat16")
    flat = np.asarray(layer.kernel[...].astype(jnp.bfloat16), np.float64).reshape(96, 70)
    expected = np.asarray(windows, np.float64) @ flat + np.asarray(layer.bias[...], np.float64)
    np.testing.assert_allclose(in_bfloat16(windows), expected, atol=1e-5)


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        pytest.param(
            {"model_type": "vit", "image_size": 24, "patch_size": 8},
            "pixel_values",
            (3, 24, 24),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"model_type": "dinov2", "image_size": 28, "patch_size": 14},
            "pixel_values",
            (3, 28, 28),
            marks=pytest.mark.slow,
        ),
        (
            {"model_type": "whisper", "architectures": ["WhisperModel"], "max_source_positions": 10},
            "input_features",
            (80, 20),
        ),
    ],
    ids=["vit", "dinov2", "whisper"],
)
def test_patch_embeddings_and_convolutions_in_front_of_an_encoder_are_int8(
    weights: str, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> None:
    """They equal those whose kernels are the rounded ones, multiplied out."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    if config["model_type"] == "whisper":
        sizes = {"d_model": 48, "encoder_attention_heads": 4, "encoder_layers": 1}
    architecture, read = build(config | sizes)
    model: Any = architecture.module(read, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    rounded = round_weights(model, weights)
    inputs = {name: jnp.asarray(np.random.default_rng(0).standard_normal((2, *shape)), jnp.float32)}
    exact, result = model.embeddings(inputs), rounded.embeddings(inputs)
    nodes = dict(nnx.iter_graph(rounded.embeddings))
    for path, node in nnx.iter_graph(model.embeddings):
        if isinstance(node, Convolution):
            their = nodes[path]
            assert their.kernel.dtype == jnp.int8
            features = node.weight.shape[0]
            scale = jnp.repeat(their.scale[...], features // len(their.scale), axis=0)
            kernel = unpack(their.kernel[...], features)[:, :48] * scale
            node.kernel[...] = kernel.reshape(node.kernel.shape)
    np.testing.assert_allclose(result, model.embeddings(inputs), atol=1e-5)
    assert 0 < float(jnp.abs(result - exact).max()) < 0.05 * float(jnp.abs(exact).max())
