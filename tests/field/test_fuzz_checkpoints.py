"""Files damaged at random, by seed: converting and loading end well or in one short error, and take little memory."""

import json
import random
import resource
import shutil
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import iceformer
from iceformer.host.messages import MAX_LINE, MAX_LINES, printable
from iceformer.model.registry import build

from ..model.cases import CASES
from .folders import WEIGHTS, tiny, write_json
from .mutations import change_bytes, change_header, change_json, change_value

MEMORY = 2**30
SHARD = "model-00001-of-00001.safetensors"
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "a",
    "eos_token": {"content": "b", "__type": "AddedToken"},
    "add_bos_token": True,
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {"3": {"content": "d", "special": True, "lstrip": False, "normalized": False}},
}
MODULES = [
    {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for index, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])
]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
PROMPTS = {"prompts": {"query": "q: "}, "default_prompt_name": None}
FILES = [
    f"decoder/{WEIGHTS}",
    "decoder/config.json",
    "decoder/generation_config.json",
    "decoder/tokenizer.json",
    "decoder/tokenizer_config.json",
    "zip/pytorch_model.bin",
    "pickle/pytorch_model.bin",
    f"shards/{WEIGHTS}.index.json",
    "embedder/config.json",
    "embedder/modules.json",
    "embedder/1_Pooling/config.json",
    "embedder/config_sentence_transformers.json",
    "embedder/sentence_bert_config.json",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, and `checkpoint`, that of the first."""
    root = tmp_path_factory.mktemp("folders")
    decoder, embedder = root / "decoder", root / "embedder"
    tiny(decoder, "llama")
    tokenizer = Tokenizer(models.BPE({chr(97 + index): index for index in range(26)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(decoder / "tokenizer.json"))
    write_json(decoder / "tokenizer_config.json", TOKENIZER_CONFIG)
    iceformer.convert_checkpoint(decoder, root / "checkpoint")
    state = load_file(decoder / WEIGHTS)
    for kind in ("zip", "pickle", "shards"):
        shutil.copytree(decoder, root / kind)
        (root / kind / WEIGHTS).rename(root / kind / SHARD)
        if kind != "shards":
            (root / kind / SHARD).unlink()
            torch.save(state, root / kind / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    write_json(root / "shards" / f"{WEIGHTS}.index.json", {"weight_map": dict.fromkeys(state, SHARD)})
    tiny(embedder, "bert")
    shutil.copy(decoder / "tokenizer.json", embedder)
    write_json(embedder / "modules.json", MODULES)
    write_json(
        embedder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    )
    write_json(
        embedder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}, "default_prompt_name": None}
    )
    write_json(embedder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    return root


def check_error(error: Exception) -> None:
    lines = str(error).split("\n")
    assert len(lines) <= MAX_LINES + 3
    assert all(printable(line) == line and len(line) <= MAX_LINE for line in lines)


def check_file(folders: Path, work: Path, file: str, seed: int) -> None:
    kind, _, name = file.partition("/")
    source = shutil.copytree(folders / kind, work / "source")
    rng = random.Random(seed)
    changes = [change_bytes]
    if name.endswith(".json"):
        changes += [change_json] * 3
    if name.endswith(".safetensors"):
        changes += [change_header]
    rng.choice(changes)(rng, source / name)
    with warnings.catch_warnings(action="ignore"):
        try:
            iceformer.load_model(iceformer.convert_checkpoint(source, work / "checkpoint"))
        except (ValueError, OSError) as error:
            check_error(error)
    shutil.rmtree(work)


def check_checkpoint(folders: Path, work: Path, expected: Iterable[np.ndarray], seed: int) -> None:
    checkpoint = shutil.copytree(folders / "checkpoint", work / "checkpoint")
    rng = random.Random(seed)
    files = sorted(path for path in (checkpoint / "params").rglob("*") if path.is_file())
    change_bytes(rng, rng.choice(files))
    try:
        for found, right in zip(parameters(checkpoint), expected, strict=True):
            np.testing.assert_array_equal(found, right)
    except (ValueError, OSError) as error:
        check_error(error)
    shutil.rmtree(work)


def check_config(variants: list[dict[str, Any]], seed: int) -> None:
    rng = random.Random(seed)
    content = [json.loads(json.dumps(rng.choice(variants)))]
    for _ in range(rng.randint(1, 2)):
        change_value(rng, content)
    if not isinstance(content[0], dict):
        return
    with suppress(ValueError):
        build(content[0])


def parameters(checkpoint: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(iceformer.load_model(checkpoint)))]


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(200), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_of_a_source(folders: Path, tmp_path: Path, file: str, seeds: range) -> None:
    before = peak()
    for seed in seeds:
        check_file(folders, tmp_path / str(seed), file, seed)
    assert peak() - before < MEMORY


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(500), marks=pytest.mark.slow)], ids=["few", "many"])
def test_damaged_parameters_are_the_same_or_refused(folders: Path, tmp_path: Path, seeds: range) -> None:
    before, expected = peak(), parameters(folders / "checkpoint")
    for seed in seeds:
        check_checkpoint(folders, tmp_path / str(seed), expected, seed)
    assert peak() - before < MEMORY


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(2000), marks=pytest.mark.slow)], ids=["few", "many"])
def test_damaged_configs_of_every_family(seeds: range) -> None:
    for model_type, cases in CASES.items():
        variants = [{"model_type": model_type, **cases.tiny, **fields} for fields in [{}, *cases.options.values()]]
        for seed in seeds:
            check_config(variants, seed)
