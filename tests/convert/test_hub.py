"""Models by their name on the hub: what is fetched, what is remembered, and every way in which it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModel

from iceformer.convert.hub import download, is_hub_id

from ..few import few
from ..field.folders import write_json, write_tensors
from ..model.cases import ENCODERS
from ..model.reference import save_random
from . import hub_server
from .hub_server import COMMIT
from .test_convert import parameters


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, save_llama: Callable[..., Any]) -> Path:
    """The hub's models, each with files that nothing needs."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_llama, root / "org" / "tiny")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "onnx/model.onnx"):
        (root / "org" / "tiny" / name).parent.mkdir(exist_ok=True)
        (root / "org" / "tiny" / name).write_text("not wanted")
    save_embedder(root / "org" / "embedder")
    save_llama(root / "org" / "sharded", max_shard_size="40KB")
    save_llama(root / "org" / "gated")
    for name in ("pickled", "weightless"):
        shutil.copytree(tiny_llama, root / "org" / name, ignore=shutil.ignore_patterns("*.safetensors"))
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(tiny_llama / "model.safetensors"), root / "org" / "pickled" / "pytorch_model.bin")
    return root


def save_embedder(folder: Path) -> None:
    """A sentence embedder whose parts all lie in folders, one of them with weights."""
    save_random(folder / "0_Transformer", "bert", auto_class=AutoModel, **ENCODERS["bert"].tiny)
    parts = {"0_Transformer": "Transformer", "pooling [mean]": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts.items()]
    write_json(folder / "modules.json", modules)
    write_json(folder / "pooling [mean]" / "config.json", {"pooling_mode": "mean"})
    width = ENCODERS["bert"].tiny["hidden_size"]
    write_json(folder / "2_Dense" / "config.json", {"in_features": width, "out_features": 3, "bias": False})
    write_tensors(folder / "2_Dense", {"linear.weight": np.ones((3, width), np.float32)})
    write_json(folder / "notes" / "config.json", {})


@pytest.fixture(scope="module")
def endpoint(models: Path) -> Iterator[str]:
    """The address of a hub that serves `models`."""
    command = [sys.executable, hub_server.__file__, str(models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(endpoint: str, tmp_path: Path) -> Run:
    """`python(*arguments, **environment)` runs the interpreter in a process that knows only that hub."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "500"}
        return subprocess.run(
            [sys.executable, *arguments],
            env={**inherited, **own, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def convert(python: Run) -> Run:
    """`convert(name, *options, **environment)` runs the command."""

    def run(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "iceformer.cli", "convert", name, "checkpoint", *options, **environment)

    return run


def fetched(tmp_path: Path, name: str) -> set[str]:
    """The files of a model in the cache."""
    snapshot = tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def test_a_model_is_fetched_and_converted(convert: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    done = convert("org/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checkpoint: checkpoint\n"
    assert "Fetching" in done.stderr or "Downloading" in done.stderr
    beside = {"config.json", "generation_config.json", "tokenizer.json"}
    assert fetched(tmp_path, "org/tiny") == {*beside, "model.safetensors"}
    found, expected = parameters(tmp_path / "checkpoint"), parameters(tiny_checkpoint)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    provenance = json.loads((tmp_path / "checkpoint" / "iceformer.json").read_text())
    assert (provenance["source"], provenance["commit"]) == ("org/tiny", COMMIT)
    assert provenance["sha256"].keys() == {"model.safetensors"}


def test_the_parts_of_a_sentence_embedder_are_fetched(convert: Any, tmp_path: Path) -> None:
    done = convert("org/embedder")
    assert done.returncode == 0, done.stderr
    weights = {"0_Transformer/model.safetensors", "2_Dense/model.safetensors"}
    configs = {f"{part}/config.json" for part in ("0_Transformer", "pooling [mean]", "2_Dense")}
    assert fetched(tmp_path, "org/embedder") == {"modules.json", *configs, *weights}
    provenance = json.loads((tmp_path / "checkpoint" / "iceformer.json").read_text())
    assert provenance["sha256"].keys() == weights


PARTS = [("org/sharded", "safetensors"), ("org/pickled", "bin")]


@pytest.mark.parametrize(("name", "suffix"), few(PARTS, PARTS[1:]))
def test_shards_and_pickles(convert: Any, tmp_path: Path, models: Path, name: str, suffix: str) -> None:
    done = convert(name, "--revision", "main")
    assert done.returncode == 0, done.stderr
    assert {file for file in fetched(tmp_path, name) if file.endswith(suffix)} == {
        path.name for path in (models / name).glob(f"*.{suffix}")
    }


def test_what_was_fetched_serves_without_the_hub(convert: Any, tmp_path: Path) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = convert("org/sharded", **environment)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "checkpoint" / "iceformer.json").read_text())["commit"] == COMMIT
        shutil.rmtree(tmp_path / "checkpoint")


REFUSED = {
    "org/nothing": r"org/nothing is neither a local folder nor a model .*`hf auth login`",
    "org/gated": r"org/gated is gated: accept its terms at http://.*/org/gated, then .*`hf auth login`",
    "org/tiny --revision v9": r"org/tiny has no revision 'v9' at http://",
    "org/weightless": r"org/weightless has no weights, expected .*; it holds: config.json, ",
}
_ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from iceformer.cli import main
for given in sys.argv[1:]:
    name, *options = given.split()
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(["convert", name, "checkpoint", *options])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue()]))
"""


def check_refusal(code: int, err: str, message: str, folder: Path) -> None:
    assert code == 1
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not (folder / "checkpoint").exists()


def test_every_refusal_is_one_sentence(python: Run, tmp_path: Path) -> None:
    done = python("-c", _ONE_AFTER_ANOTHER, *REFUSED)
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stdout.splitlines(), REFUSED.values(), strict=True):
        code, err = json.loads(line)
        check_refusal(code, err, message, tmp_path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, r"org/tiny is not a local folder, HF_HUB_OFFLINE is set, and the cache"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, r"http://127.0.0.1:9 cannot be reached, and the cache"),
    ],
)
def test_a_hub_out_of_reach_is_one_sentence(
    convert: Run, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    done = convert("org/tiny", **environment)
    check_refusal(done.returncode, done.stderr, message, tmp_path)


def test_without_huggingface_hub_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs huggingface_hub: pip install 'iceformer\[convert\]'"):
        download("org/tiny")


@pytest.mark.parametrize("name", ["gpt2", "org/name", "Org-1/name_2.5-B"])
def test_names(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("path", ["", "/abs", "./here", "../up", "a/b/c", "a//b", "a/", "~/a", "a\\b", "C:/a", "a..b"])
def test_paths(path: str) -> None:
    assert not is_hub_id(path)
