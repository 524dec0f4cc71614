"""Weights that torch.save wrote: every form in which they come, what is refused, and that no code of theirs is run."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iceformer
from iceformer.convert.reader import Weights, check_dtypes, open_weights
from iceformer.convert.tensor_file import TensorInfo

from .test_convert import parameters

State = dict[str, Any]


@pytest.fixture
def state(tiny_llama: Path) -> State:
    """The tensors of `tiny_llama`."""
    return load_file(tiny_llama / "model.safetensors")


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """`tiny_llama` without its weights."""
    return shutil.copytree(tiny_llama, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors"))


def save_shards(state: State, folder: Path) -> None:
    """Two shards with an index, as transformers wrote them."""
    names = sorted(state)
    weight_map = {name: f"pytorch_model-0000{1 + (at % 2)}-of-00002.bin" for at, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_lightning(state: State, folder: Path) -> None:
    """A trainer's file: weights, optimiser, and how far it came."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {"epoch": 3, "state_dict": state, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
    torch.save(content, folder / "epoch3.ckpt")


@pytest.mark.parametrize(
    "save",
    [
        lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
        lambda state, folder: torch.save(state, folder / "model.pt"),
        lambda state, folder: torch.save({"model": state}, folder / "consolidated.pth"),
        lambda state, folder: torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        lambda state, folder: torch.save(
            {name: torch.nn.Parameter(value) for name, value in state.items()}, folder / "pytorch_model.bin"
        ),
        lambda state, folder: torch.save(
            {name: value.t().contiguous().t() for name, value in state.items()}, folder / "pytorch_model.bin"
        ),
        save_shards,
        save_lightning,
    ],
    ids=["bin", "pt", "nested", "before_zip", "parameters", "strided", "shards", "trainer"],
)
def test_every_form_gives_what_safetensors_give(
    save: Callable[[State, Path], None], state: State, source: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch.save({"step": 1}, source / "optimizer.pt")
    torch.save({"step": 1}, source / "training_args.bin")
    save(state, source)
    found = parameters(iceformer.convert_checkpoint(source, tmp_path / "checkpoint"))
    expected = parameters(tiny_checkpoint)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])
    digests = json.loads((tmp_path / "checkpoint" / "iceformer.json").read_text())["sha256"]
    assert not digests.keys() & {"optimizer.pt", "training_args.bin"}


def test_safetensors_come_first(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    assert [file.name for file in open_weights(source).files] == ["model.safetensors"]


@pytest.mark.parametrize("before_zip", [False, True])
def test_tensors_of_every_dtype(source: Path, before_zip: bool) -> None:
    wide = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    content = {
        "f32": wide,
        "f16": wide.half(),
        "bf16": wide.bfloat16(),
        "view": wide.bfloat16()[1:4, ::2].T,
        "tied": wide,
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "position_ids": torch.arange(4)[None],
        "attn.bias": torch.ones(3, 3, dtype=torch.bool).tril(),
        "attn.mask": torch.ones(2, dtype=torch.uint8),
    }
    torch.save(content, source / "pytorch_model.bin", _use_new_zipfile_serialization=not before_zip)
    weights = open_weights(source)
    assert {name: info.dtype for name, info in weights.tensors.items()} == {
        **dict.fromkeys(("f32", "tied"), "F32"),
        **dict.fromkeys(("bf16", "view", "scalar"), "BF16"),
        "f16": "F16",
        "position_ids": "I64",
        "attn.bias": "BOOL",
        "attn.mask": "U8",
    }
    found = dict(weights.read())
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].shape == weights.tensors[name].shape == tuple(tensor.shape)
        assert (found[name].dtype == ml_dtypes.bfloat16) == (tensor.dtype == torch.bfloat16)
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())
        np.testing.assert_array_equal(weights.read_one(name), found[name])


def test_only_what_fills_a_parameter_must_be_a_float() -> None:
    file = Path("model.safetensors")
    tensors = {name: TensorInfo(file, (1,), dtype) for name, dtype in {"a": "F32", "ids": "I64", "b": "BOOL"}.items()}
    check_dtypes(Weights((file,), tensors), ["a"])
    with pytest.raises(
        ValueError, match=r"BF16, F16, F32, F64 only, but:\n  b is BOOL, in model.safetensors\n  ids is I64"
    ):
        check_dtypes(Weights((file,), tensors), ["a", "ids", "b"])


class Malicious:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("wrap", ["zip", "before_zip", "bare", "nested"])
def test_a_pickle_never_runs_code(source: Path, state: State, tmp_path: Path, wrap: str) -> None:
    trace, file = tmp_path / "ran", source / "pytorch_model.bin"
    content: State = {**state, "payload": Malicious(trace)}
    if wrap == "bare":
        file.write_bytes(pickle.dumps(content["payload"]))
    else:
        content = {"state_dict": state, "callbacks": content["payload"]} if wrap == "nested" else content
        torch.save(content, file, _use_new_zipfile_serialization=wrap != "before_zip")
    with pytest.raises(ValueError, match="can run code: it was not opened") as caught:
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert str(caught.value).startswith(f"{file} holds more than tensors (")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content["payload"] if wrap != "nested" else content["callbacks"])).close()
    assert trace.exists()  # It would have.


def test_a_whole_module_is_refused(source: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), source / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds more than tensors \(.*Linear.*only the model's state_dict"):
        open_weights(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}, "ema": {"b": 2}}, "holds 'model', 'ema', of which 2 are state dicts: 'model', 'ema'"),
        ({"epoch": None}, "holds 'epoch', of which 0 are state dicts"),
        ({}, "holds nothing"),
        ({"a": 1, "step": None}, "holds more than tensors: 'step' is a NoneType"),
        ([1], "holds a list, expected a state dict"),
    ],
)
def test_no_single_state_dict(source: Path, content: Any, message: str) -> None:
    def with_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: with_tensors(inner) for name, inner in value.items()}
        return torch.ones(value) if isinstance(value, int) else value

    torch.save(with_tensors(content), source / "model.pt")
    with pytest.raises(ValueError, match=message):
        open_weights(source)


@pytest.mark.parametrize("before_zip", [False, True])
@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-700], lambda data: b"<!DOCTYPE html>"])
def test_truncated_and_corrupt_files_are_named(
    source: Path, state: State, before_zip: bool, spoil: Callable[[bytes], bytes]
) -> None:
    file = source / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=not before_zip)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated or corrupt .*: download it again") as caught:
        open_weights(source)
    assert "\n" not in str(caught.value)


def test_shards_are_checked_as_those_of_safetensors(source: Path, state: State) -> None:
    save_shards(state, source)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks pytorch_model-00002-of-00002\.bin, which its index names"):
        open_weights(source)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.bin"}}))
    with pytest.raises(ValueError, match=r"expected the name of a \.bin file in its folder"):
        open_weights(source)


def test_several_files_without_an_index(source: Path) -> None:
    for name in ("a.pt", "b.pth"):
        torch.save({"a": torch.ones(1)}, source / name)
    with pytest.raises(FileNotFoundError, match=r"has a\.pt, b\.pth, expected one file, .* keep the one to convert"):
        open_weights(source)


def test_quantised_tensors_are_refused(source: Path) -> None:
    torch.save({"w": torch.ones(3).to(torch.float8_e4m3fn)}, source / "model.pt")
    with pytest.raises(ValueError, match=r"holds quantised weights \(w is F8_E4M3\)"):
        open_weights(source)


def test_without_torch_it_is_said_what_to_install(source: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state, source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"only be read with torch: pip install 'iceformer\[torch\]'"):
        open_weights(source)


def test_the_command_says_it_in_one_line(source: Path, state: State, tmp_path: Path) -> None:
    torch.save(state, source / "pytorch_model.bin")
    script = (
        "import sys; sys.modules['torch'] = None\nfrom iceformer.cli import main; main(['convert', *sys.argv[1:]])\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'iceformer[torch]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
