"""A tiny random Llama of 4096 positions with a byte-level tokenizer, and a text for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import iceformer

WORDS = "the line of a record is the end of story and then there was a fox who counted stars at night"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of random words."""
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS.split(), 12)).capitalize() + "." for _ in range(700)]
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(" ".join(sentences))
    return file


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Any], text: Path) -> Path:
    """The checkpoint. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("long_llama")
    save_llama(folder / "source", vocab_size=512, max_position_embeddings=4096)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text.read_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "source" / "tokenizer.json"))
    return iceformer.convert_checkpoint(folder / "source", folder / "checkpoint")
