"""A tiny decoder with a tokenizer that begins texts with `<s>`, compiled once for all field tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import iceformer
from iceformer.deploy.session import Session

from .folders import tiny

VOCABULARY = 320


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bucket of 64 tokens in chunks of 32. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("field")
    tiny(folder / "source", "llama", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello there, said the small fox."], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "source" / "tokenizer.json"))
    checkpoint = iceformer.convert_checkpoint(folder / "source", folder / "checkpoint")
    return iceformer.compile(checkpoint, folder / "artifact", buckets=(64,), attention=iceformer.Exact(), chunk=32)


@pytest.fixture(scope="session")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)
