"""weights.safetensors: any reader opens it, every tensor is aligned, and jax computes from the memory map."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from iceformer.deploy.manifest import parse_manifest
from iceformer.deploy.weights import ALIGNMENT, described, put_weights, read_weights, write_weights

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.int8)]


@given(shapes=st.lists(hnp.array_shapes(min_dims=0, max_dims=3, max_side=9), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=50)
def test_safetensors_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    tensors = {}
    for index, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[f"tensor.{index}"] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    info = write_weights(path, tensors)
    content = path.read_bytes()
    assert (info.path, info.size, info.sha256) == (path.name, len(content), hashlib.sha256(content).hexdigest())
    with safe_open(path, framework="numpy") as opened:
        assert {name for name in opened.keys() if not name.startswith("__padding__.")} == set(tensors)  # noqa: SIM118
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(opened.get_tensor(name), tensor)
    views = read_weights(path, described(tensors))
    assert set(views) == set(tensors)
    for name, view in views.items():
        assert view.ctypes.data % ALIGNMENT == 0
        assert (view.dtype, view.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(view, tensors[name])


def test_jax_shares_memory_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": np.ones((3, 5), np.float32), "b": np.ones((64, 64), ml_dtypes.bfloat16)}
    write_weights(path, tensors)
    views = read_weights(path, described(tensors))
    for name, array in put_weights(views).items():
        assert array.unsafe_buffer_pointer() == views[name].ctypes.data


def test_a_non_contiguous_tensor_is_written_in_order(tmp_path: Path) -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_weights(tmp_path / "w", {"a": tensor})
    np.testing.assert_array_equal(read_weights(tmp_path / "w", described({"a": tensor}))["a"], tensor)


def test_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor a of dtype complex64"):
        write_weights(tmp_path / "w", {"a": np.ones(2, np.complex64)})


def test_artifact_weights_equal_the_checkpoint(exact_artifact: Path, source: tuple[Path, object]) -> None:
    """Kernels are the transposed weights of the Hugging Face file."""
    manifest = parse_manifest((exact_artifact / "manifest.json").read_bytes())
    views = read_weights(exact_artifact / "weights.safetensors", manifest.weights.tensors)
    with safe_open(source[0] / "model.safetensors", framework="numpy") as opened:
        kernel = opened.get_tensor("model.layers.1.mlp.up_proj.weight").T
    np.testing.assert_array_equal(views["model.layers.1.mlp.up_proj.kernel"], kernel)
    assert sorted(views) == list(manifest.weights.tensors)
