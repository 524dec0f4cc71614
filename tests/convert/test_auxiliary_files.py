"""What goes to the checkpoint beside the parameters, and tokenizer.json made of the older forms of a tokenizer."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import iceformer


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """`tiny_llama` without its tokenizer."""
    return shutil.copytree(tiny_llama, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer*"))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_auxiliary_files_are_copied_and_nothing_else(source: Path, tmp_path: Path) -> None:
    write(source, "preprocessor_config.json", {"size": 224})
    write(source, "2_Dense/config.json", {"in_features": 3})
    (source / "modeling.py").write_text("raise RuntimeError")
    target = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    name = "preprocessor_config.json"
    assert (target / name).read_bytes() == (source / name).read_bytes()
    copied = {str(file.relative_to(target)) for file in target.rglob("*.*") if "params" not in file.parts}
    assert copied == {name, "config.json", "generation_config.json", "iceformer.json", "params.sha256"}


def save_wordpiece(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "line", "##s", "of", "records"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def save_byte_pairs(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
    write(folder, "vocab.json", {word: at for at, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (save_wordpiece, ["[CLS]", "the", "line", "##s", "of", "records", "[SEP]"]),
        (save_byte_pairs, [*"The", "Ġ", *"lines", "Ġ", *"of", "Ġ", *"records"]),
    ],
)
def test_tokenizer_json_is_made_of_older_files(source: Path, tmp_path: Path, save: Any, expected: list[str]) -> None:
    save(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of transformers' own imports
        target = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    made = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert made.encode("The lines of records").tokens == expected
    assert not (source / "tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_made_is_warned_of(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"not a model of sentencepiece")
    write(source, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.warns(UserWarning, match=r"tokenizer.model, so the checkpoint has none: tokenizer.json cannot be made"):
        target = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert not (target / "tokenizer.json").exists()


def test_without_transformers_it_is_said_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_wordpiece(source)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match=r"vocab.txt, .* pip install transformers"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")


def test_code_of_a_tokenizer_is_never_run(source: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (source / "tokenization_mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
    (source / "vocab.txt").write_text("a\nb\n")
    auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
    write(source, "tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": auto_map})
    with pytest.warns(UserWarning, match=r"tokenizer.json cannot be made"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert not trace.exists()
