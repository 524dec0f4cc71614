"""The files of a source that go to the checkpoint beside the parameters: config and tokenizer."""

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_file import read_json
from .older_tokenizers import make_tokenizer
from .tokenizer import check_vocabulary, tokenizer_json
from .tokenizer_settings import SPECIAL_TOKENS_MAP, TOKENIZER, TOKENIZER_CONFIG

CONFIG = "config.json"
CHAT_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
)
"""Files, and a pattern of files, that hold the templates of chats that tokenizer_config.json does not."""
AUXILIARY_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "generation_config.json",
    "preprocessor_config.json",
    *CHAT_TEMPLATES,
)
"""Files that go to the checkpoint where the source has them, as they are except for the tokenizer."""


def check_auxiliary_files(source: Path) -> list[str]:
    """The auxiliary files that a folder has; ValueError if one of them is not JSON, as far as it should be."""
    found = [str(file.relative_to(source)) for pattern in AUXILIARY_FILES for file in sorted(source.glob(pattern))]
    for name in found:
        if name.endswith(".json"):
            read_json(source / name)
    return found


def tokenizer_of(source: Path, fields: Mapping[str, Any], vocab_size: int | None) -> str | None:
    """The text of the checkpoint's tokenizer.json, None for a folder without a tokenizer that can be read.

    Args:
        source: the folder.
        fields: of its config.json.
        vocab_size: rows of the model's embedding; None for a model that takes no tokens.

    Raises:
        ValueError: a tokenizer that `tokenizers` does not read, or whose ids go beyond the model's embedding.

    Warns:
        UserWarning: what was decided between files that contradict each other; why there is no tokenizer.
    """
    text = tokenizer_json(source, fields) if (source / TOKENIZER).is_file() else make_tokenizer(source)
    if text is not None and vocab_size is not None:
        check_vocabulary(text, vocab_size)
    return text


def copy_auxiliary_files(source: Path, target: Path, names: list[str], tokenizer: str | None) -> None:
    """Copies the config and the auxiliary files of a source, and writes its tokenizer."""
    for name in (CONFIG, *names):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes((source / name).read_bytes().removeprefix(codecs.BOM_UTF8))
    if tokenizer is not None:
        (target / TOKENIZER).write_bytes(tokenizer.encode())


def lowercase(folder: Path) -> None:
    """Makes a folder's tokenizer.json take texts without capitals, as sentence-transformers' `do_lower_case` does."""
    tokenizer = folder / TOKENIZER
    content = read_json(tokenizer)
    normalizer = content.get("normalizer")
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    if all(step["type"] != "Lowercase" for step in steps):
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
        tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
