"""Conversion of good folders: what lands in the checkpoint, from one file, from shards, from odd names."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import iceformer
from iceformer.model.registry import ARCHITECTURES


def parameters(checkpoint: Path) -> dict[str, Any]:
    """What a module loaded from the checkpoint holds, by dotted name."""
    state = nnx.to_flat_state(nnx.state(iceformer.load_model(checkpoint)))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


def convert_changed(
    source: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], **fields: Any
) -> Path:
    """Converts a copy of `source` with its tensors and its config's fields changed."""
    shutil.copytree(source, folder / "changed")
    save_file(change(load_file(source / "model.safetensors")), folder / "changed" / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "changed" / "config.json").write_text(json.dumps({**config, **fields}))
    return iceformer.convert_checkpoint(folder / "changed", folder / "checkpoint")


def test_there_is_a_table_for_every_architecture() -> None:
    for architecture in ARCHITECTURES.values():
        table = import_module(f"iceformer.convert.tables.{architecture.table}")
        assert hasattr(table, "RULES") or hasattr(table, "rules")


def test_every_parameter_is_its_tensor(tiny_llama: Path, tiny_checkpoint: Path) -> None:
    tensors, found = load_file(tiny_llama / "model.safetensors"), parameters(tiny_checkpoint)
    assert len(found) == len(tensors)
    up = "model.layers.1.mlp.up_proj"
    np.testing.assert_array_equal(found[f"{up}.kernel"], tensors[f"{up}.weight"].T)
    np.testing.assert_array_equal(found["model.embed_tokens.embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["model.norm.scale"], tensors["model.norm.weight"])
    assert sum(value.sum(dtype=np.float64) for value in found.values()) == pytest.approx(
        sum(value.sum(dtype=np.float64) for value in tensors.values())
    )


def test_the_folder_is_complete(tiny_llama: Path, tiny_checkpoint: Path) -> None:
    copied = {"config.json", "generation_config.json", "tokenizer.json"}
    assert {path.name for path in tiny_checkpoint.iterdir()} == {"params", "params.sha256", "iceformer.json", *copied}
    for name in copied:
        assert (tiny_checkpoint / name).read_bytes() == (tiny_llama / name).read_bytes()
    provenance = json.loads((tiny_checkpoint / "iceformer.json").read_text())
    digest = hashlib.sha256((tiny_llama / "model.safetensors").read_bytes()).hexdigest()
    assert provenance == {
        "format": 2,
        "iceformer": iceformer.__version__,
        "source": "source",
        "sha256": {"model.safetensors": digest},
    }


def test_a_folder_with_weights_and_config_only(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama / name, tmp_path / "bare")
    target = iceformer.convert_checkpoint(tmp_path / "bare", tmp_path / "made" / "on" / "the" / "way")
    assert {path.name for path in target.iterdir()} == {"params", "params.sha256", "iceformer.json", "config.json"}


def test_shards_give_the_same_as_one_file(
    tiny_llama: Path, tiny_checkpoint: Path, tmp_path: Path, save_llama: Callable[..., Any]
) -> None:
    save_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    found = parameters(iceformer.convert_checkpoint(tmp_path / "sharded", tmp_path / "checkpoint"))
    expected = parameters(tiny_checkpoint)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_parameters_keep_their_dtype(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    def cast(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value if "norm" in name else value.astype(dtype) for name, value in tensors.items()}

    checkpoint = convert_changed(tiny_llama, tmp_path, cast)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(checkpoint / "params")
    model = metadata.item_metadata.tree["model"]
    assert model["embed_tokens"]["embedding"].dtype == dtype
    assert model["norm"]["scale"].dtype == np.float32
    assert {value.dtype.name for value in parameters(checkpoint).values()} == {"float32"}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.removeprefix("model."),
    ],
    ids=["compiled", "data_parallel", "bare_model"],
)
def test_known_prefixes(tiny_llama: Path, tiny_checkpoint: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    checkpoint = convert_changed(
        tiny_llama, tmp_path, lambda tensors: {rename(name): value for name, value in tensors.items()}
    )
    found, expected = parameters(checkpoint), parameters(tiny_checkpoint)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["model.norm.scale"], expected["model.norm.scale"])


def test_harmless_extras(tiny_llama: Path, tmp_path: Path) -> None:
    def with_extras(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for n in range(2)}
        return {**tensors, **frequencies, "lm_head.weight": tensors["model.embed_tokens.weight"]}

    assert "lm_head.kernel" not in parameters(
        convert_changed(tiny_llama, tmp_path, with_extras, tie_word_embeddings=True)
    )


def test_a_config_without_model_type(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = convert_changed(tiny_llama, tmp_path, lambda tensors: tensors, model_type=None)
    assert iceformer.load_model(checkpoint).config.model_type == "llama"


def test_converting_needs_neither_torch_nor_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    script = (
        "import sys, iceformer\n"
        "iceformer.load_model(iceformer.convert_checkpoint(*sys.argv[1:]))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tiny_llama), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_progress_goes_to_stderr(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iceformer.convert_checkpoint(tiny_llama, tmp_path / "checkpoint", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Converting" in captured.err


def test_a_killed_conversion_leaves_only_what_is_marked_partial_and_the_next_removes_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys, iceformer\n"
        "from iceformer.convert import convert\n"
        "convert._provenance = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "iceformer.convert_checkpoint(*sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, str(tiny_llama), str(tmp_path / "checkpoint")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".checkpoint.partial-")
    iceformer.convert_checkpoint(tiny_llama, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
