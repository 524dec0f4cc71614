"""Sources that are something else: one sentence that says what they are and what to do."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iceformer
from iceformer.host.messages import printable

from .folders import edit_json, edit_tensors, refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 134\n"


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_llama` to spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "source")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_pointers_of_git_lfs(source: Path, name: str) -> None:
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (source / "model.safetensors").unlink()
    (source / name).write_text(POINTER)
    expected = f"{source / name} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
    assert refused(source) == expected


def files(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")

    return write


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (files(), "lacks config.json, it is empty, expected a Hugging Face folder with config.json and weights"),
        (files("README.md"), "lacks config.json, expected a Hugging Face folder with config.json and weights"),
        (
            files("params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"),
            "its weights (consolidated.00.pth, consolidated.01.pth and params.json) are in the format of "
            "Meta or Mistral: make a Hugging Face folder of them, for Llama with `python -m "
            "transformers.models.llama.convert_llama_weights_to_hf --input_dir",
        ),
        (files("params.json", "consolidated.safetensors", "tekken.json"), "in the format of Meta or Mistral"),
        (files("model_index.json", "unet/config.json"), "it is a diffusers pipeline"),
        (files("saved_model.pb"), "it is a TensorFlow model"),
        (files("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"), "it is a TensorFlow checkpoint"),
        (files("flax_model.msgpack"), "it is a Flax model"),
        (files("onnx/model.onnx"), "it is an ONNX model"),
        (files("Model.mlpackage/Manifest.json"), "it is a Core ML model"),
        (files("iceformer.json"), "it is a checkpoint that `iceformer convert` made: give it to `iceformer compile`"),
        (files("checkpoint-500/config.json"), "but checkpoint-500 in it has one: give that folder"),
        (files("a/config.json", "b/config.json"), "but a, b in it have one: give that folder"),
    ],
)
def test_folders_of_other_kinds(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    message = refused(source, FileNotFoundError)
    assert found in message
    assert "\n" not in message


def test_a_folder_of_the_cache_of_the_hub(tiny_llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--organisation--name"
    snapshots = {name: cache / "snapshots" / (name * 40) for name in "ab"}
    for snapshot in snapshots.values():
        shutil.copytree(tiny_llama, snapshot)
    both = f"give the snapshot in it, {snapshots['a']}, {snapshots['b']}"
    assert refused(cache, FileNotFoundError).endswith(both)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    for folder in (cache, cache / "snapshots"):
        assert refused(folder, FileNotFoundError).endswith(f"give the snapshot in it, {snapshots['b']}")
    iceformer.convert_checkpoint(snapshots["b"], tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_its_folder(source: Path, name: str) -> None:
    assert f"give the folder that it is in, {source}" in refused(source / name, FileNotFoundError)


def test_an_archive(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    assert "is an archive" in refused(tmp_path / "model.zip", FileNotFoundError)


def test_quantised_weights_of_mlx(source: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    edit_tensors(
        source,
        {
            f"{layer}.weight": np.zeros((80, 6), np.uint32),
            f"{layer}.scales": np.ones((80, 1), np.float16),
            f"{layer}.biases": np.ones((80, 1), np.float16),
        },
    )
    assert f"holds quantised weights (MLX: {layer}.biases" in refused(source)
    edit_json(source / "config.json", quantization={"group_size": 64, "bits": 4})
    assert "MLX" in refused(source)


def test_an_index_of_each_form(source: Path) -> None:
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    iceformer.convert_checkpoint(source, source.parent / "checkpoint")


def a_list(state: dict[str, Any]) -> object:
    return list(state.values())


ODD = {
    "sparse": (lambda state: {**state, "model.norm.weight": torch.ones(48).to_sparse()}, "F32 (sparse_coo, cpu)"),
    "meta": (lambda state: {**state, "model.norm.weight": torch.ones(48, device="meta")}, "F32 (strided, meta)"),
    "complex": (lambda state: {**state, "model.norm.weight": torch.ones(48, dtype=torch.complex64)}, "weight is C64"),
    "jagged": (
        lambda state: {**state, "a": torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged)},
        "holds nested tensors, expected plain ones:\n  a",
    ),
    "stride 0": (lambda state: {**state, "a": torch.ones(1).expand(10**6, 10**6)}, "but larger tensors:\n  a [1000000"),
    "shared": (
        lambda state: {**state, **{f"x{i}": state["lm_head.weight"] for i in range(500)}},
        "more than sharing explains",
    ),
    "number for a name": (lambda state: {0: torch.ones(3)}, "names a tensor by int, expected text"),
    "tuple for a name": (lambda state: {(("a",) * 9,): 3}, "holds a tuple, of which 0 are state dicts"),
    "huge number for a name": (lambda state: {10**5000: 3}, "holds more than tensors (Unsupported operand 139)"),
    "dict in dict": (lambda state: {"a": {"b": state}}, "holds 'a', of which 0 are state dicts"),
    "list": (a_list, "holds a list, expected a state dict"),
    "control characters": (lambda state: {**state, "\x1b[31m\n": torch.ones(3)}, "unexpected: \\x1b[31m\\n [3]"),
    "a long name": (lambda state: {**state, "x" * 10**5: torch.ones(3)}, "xxx [3]"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_objects_in_torch_files(source: Path, kind: str) -> None:
    make, found = ODD[kind]
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(make(state), source / "pytorch_model.bin")
    message = refused(source)
    assert found in message
    assert len(message) < 1000
    assert all(printable(line) == line for line in message.splitlines())


def test_tensors_that_torch_views_in_other_ways(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    state["model.norm.weight"] = torch.nn.Parameter(torch.ones(1).expand(48))
    state["model.embed_tokens.weight"] = torch._neg_view(-state["model.embed_tokens.weight"])  # pyright: ignore[reportPrivateImportUsage]
    torch.save(state, source / "pytorch_model.bin")
    model: Any = iceformer.load_model(iceformer.convert_checkpoint(source, source.parent / "checkpoint"))
    expected = state["model.embed_tokens.weight"].resolve_neg().numpy()
    np.testing.assert_array_equal(model.model.embed_tokens.embedding[...], expected)


class Zeros:
    """Pickled as a call of `bytearray`, which torch allows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**12,)


@pytest.mark.parametrize("before_zip", [False, True])
def test_a_pickle_that_asks_for_memory(source: Path, before_zip: bool) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"a": Zeros()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=not before_zip)
    assert "pytorch_model.bin is truncated or corrupt (it" in refused(source)


def test_a_zip_file_that_unpacks_to_more_than_it_is(source: Path) -> None:
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**8)
    assert "its records are compressed, which torch.save does not do" in refused(source)


def test_a_program_of_torchscript(source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(source / "pytorch_model.bin"))
    assert "is a TorchScript program, expected the model's state_dict() alone" in refused(source)
