"""Loading checkpoints: the dtype asked for, and folders that are none or are damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import iceformer


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` to spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16])
def test_parameters_have_the_dtype_asked_for(tiny_checkpoint: Path, dtype: jax.typing.DTypeLike) -> None:
    leaves = jax.tree.leaves(nnx.state(iceformer.load_model(tiny_checkpoint, dtype)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert all(leaf.devices() == {jax.devices("cpu")[0]} for leaf in leaves)


def test_a_relative_path(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert iceformer.load_model(tiny_checkpoint.name).config.hidden_size == 48


def test_a_checkpoint_that_was_moved(checkpoint: Path) -> None:
    moved = checkpoint.rename(checkpoint.parent / "moved")
    assert iceformer.load_model(moved).config.hidden_size == 48


def test_other_dtypes_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="dtype is int8, expected one of: float32, bfloat16, float16"):
        iceformer.load_model(tiny_checkpoint, "int8")


def test_a_folder_that_is_no_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    for folder in (tiny_llama, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is not an iceformer checkpoint"):
            iceformer.load_model(folder)


def test_another_format(checkpoint: Path) -> None:
    (checkpoint / "iceformer.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="has format 1, expected 2"):
        iceformer.load_model(checkpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 64}, r"model.layers.1.mlp.up_proj.kernel is \[48, 80\], expected \[48, 64\]"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.scale is missing, expected \[48\]"),
        ({"tie_word_embeddings": True}, r"lm_head.kernel is \[48, 288\], expected none"),
    ],
)
def test_a_config_that_does_not_fit(checkpoint: Path, fields: dict[str, Any], message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=message):
        iceformer.load_model(checkpoint)


def test_missing_parameters(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "params")
    with pytest.raises(FileNotFoundError, match="lacks params"):
        iceformer.load_model(checkpoint)


def test_damaged_parameters(checkpoint: Path) -> None:
    for file in (checkpoint / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-100])
    # In a process of its own, because Orbax leaves coroutines behind that complain when they are collected.
    script = "import sys, iceformer; iceformer.load_model(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ValueError: {checkpoint / 'params'} cannot be read" in done.stderr


def test_parameters_without_their_metadata(checkpoint: Path) -> None:
    (checkpoint / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="params cannot be read"):
        iceformer.load_model(checkpoint)
