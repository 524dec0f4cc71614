"""Bad input: one clear error that names what is wrong, and nothing left behind."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import iceformer
from iceformer.convert import convert

Change = Callable[[Path], None]


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_llama` to spoil."""
    return shutil.copytree(tiny_llama, tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path, save_llama: Callable[..., Any]) -> Path:
    """A sharded folder to spoil."""
    save_llama(tmp_path / "source", max_shard_size="40KB")
    return tmp_path / "source"


def refused(source: Path, error: type[Exception]) -> str:
    """The message with which converting fails, after a look that the target's folder is as it was."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error) as caught:
        iceformer.convert_checkpoint(source, source.parent / "new" / "checkpoint")
    assert sorted(source.parent.iterdir()) == before
    return str(caught.value)


def change_tensors(source: Path, **tensors: np.ndarray | None) -> None:
    """Sets tensors by name, with "__" for "."; None removes one."""
    changed: dict[str, Any] = load_file(source / "model.safetensors")
    changed.update({name.replace("__", "."): value for name, value in tensors.items()})
    save_file({name: value for name, value in changed.items() if value is not None}, source / "model.safetensors")


def change_config(source: Path, **fields: object) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_index(source: Path, **files: str) -> None:
    """Places tensors, with "__" for ".", in other files."""
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update({name.replace("__", "."): value for name, value in files.items()})
    file.write_text(json.dumps(index))


def test_all_that_does_not_fit_is_listed(source: Path) -> None:
    change_tensors(
        source,
        model__layers__0__mlp__up_proj__weight=np.zeros((3, 4), np.float32),
        model__layers__1__self_attn__q_proj__bias=np.zeros(64, np.float32),
        model__layers__2__input_layernorm__weight=np.ones(48, np.float32),
        model__layers__0__input_layernorm__weight=None,
        norm__weight=np.ones(48, np.float32),
        other__weight=np.zeros((2, 48), np.float32),
        lm_head__weight=None,
    )
    lines = refused(source, ValueError).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "wrong shape: model.layers.0.mlp.up_proj.weight is [3, 4], expected [80, 48]",
        "unexpected: model.layers.1.self_attn.q_proj.bias [64], the config has no place for it",
        "unexpected: model.layers.2.input_layernorm.weight [48], the config has no place for it",
        "there twice: norm.weight and model.norm.weight",
        "unexpected: other.weight [2, 48]",
        "missing: lm_head.kernel [48, 288]",
        "missing: model.layers.0.input_layernorm.scale [48]",
    ]


def test_weights_that_are_not_finite_are_named(source: Path) -> None:
    change_tensors(
        source,
        model__norm__weight=np.full(48, np.nan, np.float32),
        lm_head__weight=np.full((288, 48), -np.inf, np.float32),
    )
    assert refused(source, ValueError).endswith("NaN or infinite values in:\n  lm_head.weight\n  model.norm.weight")


def test_a_tied_output_layer_of_its_own_is_refused(source: Path) -> None:
    change_config(source, tie_word_embeddings=True)
    assert "lm_head.weight differs from the tensor of model.embed_tokens.embedding" in refused(source, ValueError)


def test_other_dtypes_are_refused(source: Path) -> None:
    change_tensors(source, model__norm__weight=np.ones(48, np.int8), lm_head__weight=np.zeros((288, 48), np.int64))
    message = refused(source, ValueError)
    assert "lm_head.weight is I64" in message
    assert "model.norm.weight is I8" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mamba"},
        {"model_type": None, "architectures": None},
        {"hidden_act": "mish"},
        {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}},
        {"quantization_config": {"quant_method": "bitnet"}},
    ],
)
def test_what_the_models_cannot_do_is_refused(source: Path, fields: dict[str, object]) -> None:
    change_config(source, **fields)
    assert "config: " in refused(source, ValueError)


def truncate(file: Path, size: int) -> None:
    os.truncate(file, size)


def spoil_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xfe\x00{"
    file.write_bytes(data)


def overlap_tensors(file: Path) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: truncate(file, 0),
        lambda file: truncate(file, 5),
        lambda file: truncate(file, 500),
        lambda file: truncate(file, file.stat().st_size - 1),
        lambda file: file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:]),
        lambda file: file.write_bytes(b"<!DOCTYPE html><p>not found"),
        spoil_header,
        overlap_tensors,
    ],
)
def test_truncated_and_corrupt_files_are_named(source: Path, spoil: Change) -> None:
    spoil(source / "model.safetensors")
    assert f"{source / 'model.safetensors'} is truncated or corrupt" in refused(source, ValueError)


def test_missing_shards_are_named(sharded: Path) -> None:
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    for name in names[1:3]:
        (sharded / name).unlink()
    assert f"lacks {names[1]}, {names[2]}" in refused(sharded, FileNotFoundError)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    file = max(sharded.glob("*.safetensors"))
    truncate(file, file.stat().st_size // 2)
    assert f"{file} is truncated or corrupt" in refused(sharded, ValueError)


def test_an_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    first, *_, last = sorted(file.name for file in sharded.glob("*.safetensors"))
    change_index(sharded, model__nothing__weight=first)
    assert f"model.nothing.weight in {first}" in refused(sharded, ValueError)
    shutil.copy(sharded / first, sharded / last)
    assert f"is both in {first} and in {last}" in refused(sharded, ValueError)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "..\\a.safetensors", "a.bin", ".."])
def test_an_index_cannot_point_out_of_its_folder(sharded: Path, name: str) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    change_index(sharded, model__norm__weight=name)
    assert "expected the name of a .safetensors file in its folder" in refused(sharded, ValueError)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', "\xff"])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert "model.safetensors.index.json" in refused(sharded, ValueError)


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "download the index too" in refused(sharded, FileNotFoundError)


@pytest.mark.parametrize(
    ("tensor", "value", "found"),
    [
        ("model.norm.weight", np.ones(48, ml_dtypes.float8_e4m3fn), "model.norm.weight is F8_E4M3"),
        ("model.layers.0.mlp.up_proj.qweight", np.ones((6, 80), np.int32), "GPTQ or AWQ: model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj.weight.absmax", np.ones(80, np.float32), "bitsandbytes: model.layers.0.mlp"),
    ],
)
def test_quantised_weights_are_known_without_a_word_in_the_config(
    source: Path, tensor: str, value: np.ndarray, found: str
) -> None:
    change_tensors(source, **{tensor.replace(".", "__"): value})
    message = refused(source, ValueError)
    assert f"{source} holds quantised weights ({found}" in message
    assert "convert the model that this one was quantised from" in message


def test_code_of_an_unknown_architecture_is_not_run(source: Path) -> None:
    (source / "modeling.py").write_text(f"open({str(source.parent / 'ran')!r}, 'w')")
    change_config(source, model_type="mine", auto_map={"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"})
    assert "names code that comes with the model, which is never run" in refused(source, ValueError)


def test_code_beside_a_known_architecture_is_not_needed(source: Path, tmp_path: Path) -> None:
    change_config(source, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    target = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert "modeling.py" not in {path.name for path in target.iterdir()}


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack"])
def test_weights_of_other_frameworks_are_named(source: Path, name: str) -> None:
    (source / "model.safetensors").rename(source / name)
    assert f"has its weights only in {name}, expected model.safetensors" in refused(source, FileNotFoundError)


def test_a_revision_is_for_the_hub(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"revision is 'main', but .* is a folder"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint", revision="main")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(source: Path, name: str) -> None:
    (source / name).unlink()
    assert name in refused(source, FileNotFoundError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "modules.json"])
def test_broken_json_is_named(source: Path, name: str) -> None:
    (source / name).write_text("[1, 2")
    assert f"{source / name} is not valid JSON" in refused(source, ValueError)


def test_a_source_that_is_no_folder(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nowhere", FileNotFoundError)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path, make: Change) -> None:
    make(tmp_path / "checkpoint")
    with pytest.raises(FileExistsError, match="exists: remove it first"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "source"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_while_writing_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("no space left")

    monkeypatch.setattr(convert, "_provenance", fail)
    assert refused(source, error) == "no space left"
