"""A tiny random Llama with a tokenizer, as a Hugging Face folder, a checkpoint, and compiled once per run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import iceformer
from iceformer.attention import DecodeSelection, LowRank, MeanPool, Plan
from iceformer.deploy.session import Session

TEXT = "Once upon a time there was a small fox who lived in a wood and counted the stars at night. " * 8
EOS = 2
VOCABULARY = 320
BUCKETS = (64, 128)
CHUNK = 32
TWO_STAGE = iceformer.TwoStage(method=MeanPool(), budget=32, query_block=8, key_block=2, sink=4, local=4)
SELECTION = DecodeSelection(LowRank(rank=4), budget=24, key_block=2, sink=4, local=4, exact_layers=1)
REFRESHING = Plan(decode=replace(SELECTION, refresh=4))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Any]) -> tuple[Path, Any]:
    """The Hugging Face folder and the model in transformers."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    reference = save_llama(folder, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=EOS)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [EOS, 3]}))
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder, reference


@pytest.fixture(scope="session")
def reference(source: tuple[Path, Any]) -> Any:
    """The model in transformers."""
    return source[1]


@pytest.fixture(scope="session")
def checkpoint(source: tuple[Path, Any]) -> Path:
    return iceformer.convert_checkpoint(source[0], source[0].parent / "checkpoint")


@pytest.fixture(scope="session")
def exact_artifact(checkpoint: Path) -> Path:
    return iceformer.compile(
        checkpoint, checkpoint.parent / "exact", buckets=BUCKETS, attention=iceformer.Exact(), chunk=CHUNK
    )


@pytest.fixture(scope="session")
def two_stage_artifact(checkpoint: Path) -> Path:
    """One bucket, two rows, no exact first chunk: the budget is a quarter of the capacity."""
    return iceformer.compile(
        checkpoint, checkpoint.parent / "two_stage", buckets=(128,), attention=TWO_STAGE, chunk=CHUNK, batch=2
    )


@pytest.fixture(scope="session")
def exact_256_artifact(checkpoint: Path) -> Path:
    return iceformer.compile(
        checkpoint, checkpoint.parent / "exact_256", buckets=(256,), attention=iceformer.Exact(), chunk=CHUNK
    )


@pytest.fixture(scope="session")
def paged_artifact(checkpoint: Path) -> Path:
    """As `two_stage_artifact`, with two pages for each of the two rows."""
    return iceformer.compile(
        checkpoint, checkpoint.parent / "paged", buckets=(256,), attention=TWO_STAGE, chunk=CHUNK, batch=2, page=128
    )


@pytest.fixture(scope="session")
def refreshing_artifact(checkpoint: Path) -> Path:
    """New tokens keep a selection for some steps."""
    return iceformer.compile(
        checkpoint, checkpoint.parent / "refreshing", buckets=(128,), attention=REFRESHING, chunk=CHUNK, batch=2
    )


@pytest.fixture(scope="session")
def exact_session(exact_artifact: Path) -> Session:
    return iceformer.load(exact_artifact)


@pytest.fixture(scope="session")
def two_stage_session(two_stage_artifact: Path) -> Session:
    return iceformer.load(two_stage_artifact)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
