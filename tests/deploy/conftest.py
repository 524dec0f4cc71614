"""A tiny random Llama with a tokenizer, as a Hugging Face folder, a checkpoint, and compiled once per run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM

import iceformer
from iceformer.attention import Attention, DecodeSelection, LowRank, MeanPool, Plan
from iceformer.deploy.session import Session

from ..conftest import Once

TEXT = "Once upon a time there was a small fox who lived in a wood and counted the stars at night. " * 8
EOS = 2
VOCABULARY = 320
BUCKETS = (64, 128)
CHUNK = 32
TWO_STAGE = iceformer.TwoStage(method=MeanPool(), budget=32, query_block=8, key_block=2, sink=4, local=4)
SELECTION = DecodeSelection(LowRank(rank=4), budget=24, key_block=2, sink=4, local=4, exact_layers=1)
REFRESHING = Plan(decode=replace(SELECTION, refresh=4))


@pytest.fixture(scope="session")
def source(once: Once, save_llama: Callable[..., Any]) -> tuple[Path, Any]:
    """The Hugging Face folder and the model in transformers."""

    def make(folder: Path) -> None:
        save_llama(folder / "tiny", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=EOS)
        generation = {"bos_token_id": 1, "eos_token_id": [EOS, 3]}
        (folder / "tiny" / "generation_config.json").write_text(json.dumps(generation))
        _tokenizer().save(str(folder / "tiny" / "tokenizer.json"))

    folder = once("source", make) / "tiny"
    return folder, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def reference(source: tuple[Path, Any]) -> Any:
    """The model in transformers."""
    return source[1]


@pytest.fixture(scope="session")
def checkpoint(once: Once, source: tuple[Path, Any]) -> Path:
    return once("checkpoint", lambda folder: iceformer.convert_checkpoint(source[0], folder / "tiny")) / "tiny"


@pytest.fixture(scope="session")
def compiled(once: Once, checkpoint: Path) -> Callable[..., Path]:
    """`compiled(name, attention, buckets, options...)`: an artifact of the checkpoint."""

    def artifact(name: str, attention: Attention | Plan, buckets: tuple[int, ...], **options: Any) -> Path:
        options |= {"attention": attention, "buckets": buckets, "chunk": CHUNK}
        return once(name, lambda folder: iceformer.compile(checkpoint, folder / "artifact", **options)) / "artifact"

    return artifact


@pytest.fixture(scope="session")
def exact_artifact(compiled: Callable[..., Path]) -> Path:
    return compiled("exact", iceformer.Exact(), BUCKETS)


@pytest.fixture(scope="session")
def exact_256_artifact(compiled: Callable[..., Path]) -> Path:
    return compiled("exact_256", iceformer.Exact(), (256,))


@pytest.fixture(scope="session")
def two_stage_artifact(compiled: Callable[..., Path]) -> Path:
    """One bucket, two rows, no exact first chunk: the budget is a quarter of the capacity."""
    return compiled("two_stage", TWO_STAGE, (128,), batch=2)


@pytest.fixture(scope="session")
def paged_artifact(compiled: Callable[..., Path]) -> Path:
    """Two rows, with two pages for each."""
    return compiled("paged", TWO_STAGE, (256,), batch=2, page=128)


@pytest.fixture(scope="session")
def refreshing_artifact(compiled: Callable[..., Path]) -> Path:
    """Two rows, whose new tokens keep a selection for some steps."""
    return compiled("refreshing", REFRESHING, (128,), batch=2)


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
