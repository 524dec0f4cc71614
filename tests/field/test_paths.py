"""Folders of any name, and in any state: what can be written and read is, the rest is refused before the work."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import iceformer
from iceformer.convert.parameters import restore_params, save_params, stored_params

from .folders import refused, unprivileged

NAMES = [
    "llama[v1]",
    "[0-9]",
    "a*b?",
    "{a,b}",
    "100%",
    "%41",
    "a#1",
    "two words",
    "trailing ",
    "dot.",
    "..a",
    "-x",
    "~",
    "$HOME",
    "'single' \"double\"",
    "new\nline",
    "back\\slash",
    "gs:",
    "file:",
    "a?b=c&d;e|f",
    "日本 é 🧊",
    "\x1b[31mred",
    os.fsdecode(b"\xff\xfe"),
    "n" * 255,
]
ALL_AT_ONCE = "m[v1]*?{a,b}%41#é\n'\"\\ $HOME gs: -. "


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    array = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    folder = tmp_path / name / "params"
    folder.parent.mkdir()
    save_params(folder, {"a": {"b": array}})
    assert {key: leaf.shape for key, leaf in stored_params(folder).items()} == {"a.b": (2, 3)}
    np.testing.assert_array_equal(restore_params(folder, {"a": {"b": array}})["a"]["b"], array)


def test_from_the_source_to_the_artifact_in_folders_of_any_name(
    tiny_llama: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / ALL_AT_ONCE / "source[0]")
    monkeypatch.chdir(tmp_path)
    checkpoint = iceformer.convert_checkpoint(source, Path(ALL_AT_ONCE, "check[point]", ALL_AT_ONCE))
    found, expected = (
        jax.tree.leaves(nnx.state(iceformer.load_model(folder))) for folder in (checkpoint, tiny_checkpoint)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    artifact = iceformer.compile(
        checkpoint, Path(ALL_AT_ONCE, "arti[fact]"), buckets=(16,), attention=iceformer.Exact(), chunk=16
    )
    assert len(iceformer.load(artifact).generate([1, 2, 3], max_new_tokens=2).ids) == 2


def test_a_checkpoint_that_was_renamed_and_is_read_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "a[b]" / "checkpoint")
    renamed = checkpoint.parent.rename(tmp_path / "c{d}*") / "checkpoint"
    for path in (*renamed.rglob("*"), renamed, renamed.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with unprivileged():
        assert iceformer.load_model(renamed).config.hidden_size == 48


def test_through_symbolic_links(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "blobs")
    linked = tmp_path / "snap[shot]"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "real").mkdir()
    (tmp_path / "li*nk").symlink_to(tmp_path / "real")
    iceformer.convert_checkpoint(linked, tmp_path / "li*nk" / "checkpoint")
    assert iceformer.load_model(tmp_path / "real" / "checkpoint").config.hidden_size == 48


def test_a_name_that_looks_like_an_address(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = iceformer.convert_checkpoint(tiny_llama, "gs://bucket/checkpoint")
    assert (tmp_path / "gs:" / "bucket" / "checkpoint" / "params").is_dir()
    assert iceformer.load_model(checkpoint).config.hidden_size == 48


@pytest.mark.parametrize("parent", ["file/new", "file", "file/a/b", "locked", "dangling"])
def test_where_nothing_can_be_made_is_said_before_the_work(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "source").mkdir()  # Whatever is wrong with it is not seen.
    with unprivileged(), pytest.raises((PermissionError, NotADirectoryError)) as caught:
        iceformer.convert_checkpoint(tmp_path / "source", tmp_path / parent / "checkpoint")
    assert str(tmp_path / parent.partition("/")[0]) in str(caught.value)


def test_a_name_that_is_too_long(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        iceformer.convert_checkpoint(tiny_llama, tmp_path / ("n" * 256))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "pytorch_model.bin"]
)
def test_a_file_that_must_not_be_read(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    if name == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
    (source / name).touch()
    (source / name).chmod(0)
    with unprivileged():
        assert refused(source, PermissionError) == f"[Errno 13] Permission denied: '{source / name}'"


@pytest.mark.parametrize("name", ["params", "config.json", "iceformer.json"])
def test_a_part_of_a_checkpoint_that_must_not_be_read(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / name).chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match=f"Permission denied: '{checkpoint / name}"):
        iceformer.load_model(checkpoint)
    (checkpoint / name).chmod(0o700)


def test_the_names_of_a_source_are_kept_out_of_the_checkpoint(tiny_checkpoint: Path) -> None:
    provenance = json.loads((tiny_checkpoint / "iceformer.json").read_text())
    assert provenance["source"] == "source"
