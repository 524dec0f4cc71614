"""Tiny folders of sentence-transformers, and what the library and a checkpoint make of a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel

import iceformer
from iceformer.convert.text import TextSettings, read_text_settings
from iceformer.deploy.tokenization import Cut, TextTokenizer, Tokens
from iceformer.model.encoder import Encoder

from .folders import tiny, write_json

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["small", "foxes", "count", "the", "stars", "at", "night", "Small", "Foxes", "query", ":"],
]
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
TEXTS = ["small foxes", "Small Foxes count the stars", "", "the stars at night " * 20]


def backbone(folder: Path, model_type: str = "bert", *, auto_class: Any = AutoModel, **fields: Any) -> Path:
    """A random model with a tokenizer of whole words, of 48 tokens at most."""
    tiny(folder, model_type, auto_class=auto_class, **fields)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([word for word in WORDS if word[0] == "["])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 48}
    write_json(folder / "tokenizer_config.json", config)
    return folder


def embedder(folder: Path, *modules: Any, options: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Saves a sentence embedder of a tiny BERT with sentence-transformers.

    Args:
        folder: to save in; the model itself comes from a folder beside it.
        modules: behind the transformer; pooling by the mean if there are none.
        options: of the transformer.
        settings: of the whole.
    """
    plain = folder.parent / "plain"
    if not plain.exists():
        backbone(plain)
    transformer = Transformer(str(plain), **(options or {}))
    whole = [transformer, *(modules or (Pooling(transformer.get_embedding_dimension()),))]
    SentenceTransformer(modules=whole, **settings).save(str(folder), create_model_card=False)
    return folder


def library(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def convert(folder: Path) -> Path:
    return iceformer.convert_checkpoint(folder, folder.parent / f"checkpoint of {folder.name}")


def settings_of(checkpoint: Path) -> TextSettings:
    settings = read_text_settings(checkpoint)
    assert settings is not None
    return settings


def tokens_of(checkpoint: Path, *texts: str) -> Tokens:
    """As a session cuts a text, or a pair of texts, into tokens."""
    settings = settings_of(checkpoint)
    cut = settings.max_seq_length and Cut(settings.max_seq_length, settings.truncation_side)
    data, options = (checkpoint / name for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = TextTokenizer(data.read_bytes(), None, cut or None, options=options.read_bytes())
    return tokenizer.encode(*texts, add_special_tokens=True)


def outputs_of(checkpoint: Path, texts: Sequence[str | tuple[str, str]]) -> dict[str, np.ndarray]:
    """What the model of a checkpoint makes of texts, each in a row of its own."""
    model = iceformer.load_model(checkpoint)
    assert isinstance(model, Encoder)
    rows = [tokens_of(checkpoint, *((text,) if isinstance(text, str) else text)) for text in texts]
    lengths = np.array([row.ids.size for row in rows], np.int32)
    arrays = {name: np.zeros((len(rows), lengths.max()), np.int32) for name in model.inputs(1)}
    for index, row in enumerate(rows):
        arrays["input_ids"][index, : row.ids.size] = row.ids
        if "token_type_ids" in arrays and settings_of(checkpoint).segments:
            arrays["token_type_ids"][index, : row.ids.size] = row.type_ids
    inputs = {name: jnp.asarray(array) for name, array in arrays.items()}
    outputs = model.encode(inputs, jnp.asarray(lengths))
    return {name: np.asarray(array) for name, array in outputs.items()}


def same_direction(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal vectors, by their cosines and by their numbers."""
    assert found.shape == expected.shape
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    assert ((found * expected).sum(-1) / lengths).min() > 1 - 1e-5
    np.testing.assert_allclose(found, expected, atol=1e-4)
