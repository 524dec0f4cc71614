"""Faults of disks, processes and files, and sizes and casts that go beyond what a folder holds."""

import _thread
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import iceformer
from iceformer.convert.finite import all_finite
from iceformer.convert.json_file import parse_json
from iceformer.host.messages import MAX_LINE, printable

from .folders import (
    edit_json,
    edit_tensors,
    read_json,
    refused,
    rename_tensors,
    tensors_of,
    tiny,
    write_json,
    write_tensors,
)


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_llama` to spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "source")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` to spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_a_full_disk_is_one_line(source: Path, capfd: pytest.CaptureFixture[str], size: int) -> None:
    with file_limit(size):
        message = refused(source, OSError)
    assert message.startswith("[Errno 27] File too large: ")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_save_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ocp.Checkpointer.save

    def interrupted(*args: Any, **options: Any) -> None:
        _thread.interrupt_main()
        save(*args, **options)

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    before = sorted(source.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        iceformer.convert_checkpoint(source, source.parent / "new" / "checkpoint")
    assert sorted(source.parent.iterdir()) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(file: Path) -> None:
    file.write_bytes(bytes(reversed(file.read_bytes())))


@pytest.mark.parametrize("spoil", [cut, overwrite, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*", "ocdbt.process_0/d/*", "_METADATA"])
def test_damaged_parameters_are_one_line(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], name: str, spoil: Callable[[Path], None]
) -> None:
    for file in (checkpoint / "params").glob(name):
        spoil(file)
    with pytest.raises(ValueError, match=r"params cannot be read \(params/.* (damaged|missing)\)") as with_sums:
        iceformer.load_model(checkpoint)
    (checkpoint / "params.sha256").unlink()
    with pytest.raises(ValueError, match="params cannot be read") as without:
        iceformer.load_model(checkpoint)
    assert "\n" not in str(with_sums.value) + str(without.value)
    assert capfd.readouterr() == ("", "")


def test_checksums_lead_nowhere_else(checkpoint: Path) -> None:
    (checkpoint / "params.sha256").write_text("0  params/../../outside\n")
    with pytest.raises(ValueError, match="is damaged"):
        iceformer.load_model(checkpoint)


@pytest.mark.parametrize(
    ("stored", "value", "wanted"),
    [
        (ml_dtypes.bfloat16, 1e5, "float16"),
        (np.float32, -1e5, "float16"),
        (np.float32, 3.4e38, "bfloat16"),
    ],
)
def test_a_cast_that_overflows_names_the_tensor(source: Path, stored: Any, value: float, wanted: str) -> None:
    norm = np.ones(48, stored)
    norm[7] = value
    edit_tensors(source, {"model.norm.weight": norm})
    checkpoint = iceformer.convert_checkpoint(source, source.parent / "checkpoint")
    with pytest.raises(ValueError, match="values that are too large for the requested dtype") as caught:
        iceformer.load_model(checkpoint, wanted)
    line = f"model.norm.scale: {np.dtype(stored)} in the checkpoint, {wanted} requested"
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [line]
    model: Any = iceformer.load_model(checkpoint, np.dtype(stored))
    assert float(model.model.norm.scale[7]) == pytest.approx(value, rel=0.01)


def test_rows_of_several_dtypes_go_into_one_that_holds_them_all(tmp_path: Path) -> None:
    tiny(tmp_path / "source", "mixtral")
    tensors = tensors_of(tmp_path / "source")
    stacked = {name: value for name, value in tensors.items() if value.ndim == 3}
    for name, value in stacked.items():
        del tensors[name]
        parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[name.rpartition(".")[2]]
        for expert, matrix in enumerate(value):
            dtype = np.float16 if expert == 0 else np.float32
            for part, piece in zip(parts, np.split(matrix, len(parts)), strict=True):
                block = name.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")[0]
                tensors[f"{block}.{expert}.{part}.weight"] = (piece * 1e5 * (expert > 0)).astype(dtype)
    write_tensors(tmp_path / "source", tensors)
    model: Any = iceformer.load_model(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    assert all_finite(np.asarray(model.model.layers[0].mlp.down_proj[...]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_finite(dtype: Any) -> None:
    array = np.ones((3, 2**19), dtype)
    assert all_finite(array)
    assert all_finite(array[:0])
    assert all_finite(np.full(1, ml_dtypes.finfo(dtype).max, dtype))
    for value in (np.nan, np.inf, -np.inf):
        array[-1, -1] = value
        assert not all_finite(array)
        assert not all_finite(array.T)


SIZES = {
    "llama": ["num_hidden_layers", "vocab_size", "intermediate_size", "hidden_size", "head_dim", "num_attention_heads"],
    "mixtral": ["num_local_experts"],
    "qwen3_moe": ["num_local_experts", "moe_intermediate_size"],
    "gpt2": ["n_layer", "n_positions", "n_inner", "n_embd", "n_head"],
    "gemma3_text": ["num_hidden_layers", "vocab_size"],
    "bert": ["num_hidden_layers", "max_position_embeddings", "type_vocab_size"],
    "distilbert": ["n_layers", "max_position_embeddings"],
    "t5": ["num_layers", "d_kv", "num_heads", "relative_attention_num_buckets"],
    "vit": ["num_hidden_layers", "image_size", "num_channels", "patch_size"],
}
ASKED = (10**5, 10**6, 2**31 - 1, 10**12, 2**63, 10**40)


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("llama", (9999, 2**31 - 1)),
        ("bert", (9999, 2**31 - 1)),
        *(pytest.param(model_type, ASKED, marks=pytest.mark.slow) for model_type in SIZES),
    ],
)
def test_sizes_beyond_what_the_folder_holds(tmp_path: Path, model_type: str, asked: tuple[int, ...]) -> None:
    """Whatever a config asks for, refusing it takes no more than the folder does."""
    tiny(tmp_path / "source", model_type)
    config = tmp_path / "source" / "config.json"
    before = read_json(config)
    checkpoint = iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    for name in SIZES[model_type]:
        for size in asked:
            edit_json(config, **{name: size})
            refused(tmp_path / "source")
            shutil.copy(config, checkpoint / "config.json")
            with pytest.raises(ValueError, match=r"config|does not fit"):
                iceformer.load_model(checkpoint)
        config.write_text(json.dumps(before))


def test_layers_that_a_folder_under_another_prefix_cannot_hold(source: Path) -> None:
    rename_tensors(source, "my.")
    edit_json(source / "config.json", num_hidden_layers=9999)
    assert "the number of layers is 9999, but" in refused(source)


def test_lists_of_a_config_that_are_long(source: Path) -> None:
    edit_json(source / "config.json", model_type="qwen3", layer_types=["full_attention"] * 10**5)
    message = refused(source)
    assert "layer_types" in message
    assert len(message) <= MAX_LINE


DEEP = "[" * 10**5 + "]" * 10**5
SPOILED_JSON = {
    "deep list": (DEEP, "nested too deeply"),
    "deep object": ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
    "just too deep": ("[" * 129 + "]" * 129, "nested too deeply"),
    "digits": ('{"vocab_size": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
    "twice": ('{"vocab_size": 1, "vocab_size": 2}', "an object has two values for 'vocab_size'"),
    "latin-1": (b'{"name": "\xe9"}', "byte 10 is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "empty": ("", "is truncated or corrupt (it is empty)"),
    "html": ("<!DOCTYPE html><p>not found", "is not valid JSON (Expecting value"),
    "pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a git-lfs pointer, not the file itself: run `git lfs pull`",
    ),
    "control characters": ('{"\x1b[31m', "is not valid JSON"),
}
READ_AT_CONVERT = ("config.json", "generation_config.json", "tokenizer_config.json", "modules.json", "tokenizer.json")


@pytest.mark.parametrize("kind", SPOILED_JSON)
def test_json_of_every_kind_is_one_line(source: Path, checkpoint: Path, kind: str) -> None:
    content, found = SPOILED_JSON[kind]
    spoiled = content.encode() if isinstance(content, str) else content
    for name in READ_AT_CONVERT:
        before = (source / name).read_bytes() if (source / name).exists() else None
        (source / name).write_bytes(spoiled)
        message = refused(source)
        assert message.startswith(f"{source / name} ")
        assert found in message
        assert printable(message) == message
        (source / name).unlink() if before is None else (source / name).write_bytes(before)
    for name in ("config.json", "iceformer.json"):
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(spoiled)
        with pytest.raises(ValueError, match=name) as caught:
            iceformer.load_model(checkpoint)
        assert found in str(caught.value)
        (checkpoint / name).write_bytes(before)


def test_an_index_of_every_kind_is_one_line(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    for content, found in SPOILED_JSON.values():
        spoiled = content.encode() if isinstance(content, str) else content
        (source / "model.safetensors.index.json").write_bytes(spoiled)
        assert found in refused(source)


def test_a_byte_order_mark_is_left_out(source: Path) -> None:
    expected = iceformer.load_model(iceformer.convert_checkpoint(source, source.parent / "plain")).config
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    checkpoint = iceformer.convert_checkpoint(source, source.parent / "checkpoint")
    assert iceformer.load_model(checkpoint).config == expected
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        json.loads((checkpoint / name).read_text(encoding="utf-8"))


def test_json_within_the_bounds(tmp_path: Path) -> None:
    content = {"a": {"b": [1, 10**39, -1.5, "é", None]}, "c": []}
    for _ in range(125):
        content = {"d": content}
    (tmp_path / "file.json").write_text(json.dumps(content))
    assert parse_json(tmp_path / "file.json") == content
    (tmp_path / "file.json").write_text('{"a": 1, "a": 1}')
    assert parse_json(tmp_path / "file.json") == {"a": 1}


def test_what_is_no_file(source: Path) -> None:
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").mkdir()
    assert refused(source, OSError) == f"{source / 'generation_config.json'} is not a file"


@pytest.mark.parametrize("number", [2**22, 2**31, 2**63])
def test_an_id_that_no_vocabulary_reaches(source: Path, number: int) -> None:
    content = read_json(source / "tokenizer.json")
    content["model"]["vocab"]["a"] = number
    write_json(source / "tokenizer.json", content)
    assert f"has a token with id {number}, expected less than {2**22}" in refused(source)
    content["model"]["vocab"]["a"] = 0
    content["added_tokens"] = [{"id": number, "content": "<x>", "special": True}]
    write_json(source / "tokenizer.json", content)
    assert f"has a token with id {number}, expected less than {2**22}" in refused(source)
