"""The files of a source that go to the checkpoint beside the parameters: config and tokenizer."""

import codecs
import json
import warnings
from pathlib import Path

from .json_file import read_json

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
"""Files that go to the checkpoint as they are, where the source has them."""
TOKENIZER_SOURCES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files of the older forms of a tokenizer, of which tokenizer.json is made where that is lacking."""


def check_companions(source: Path) -> list[str]:
    """The companions that a folder has; ValueError if one of them is not JSON."""
    found = [name for name in COMPANIONS if (source / name).exists()]
    for name in found:
        read_json(source / name)
    return found


def copy_companions(source: Path, target: Path, names: list[str]) -> None:
    """Copies the config and the companions of a source, and makes tokenizer.json if it has a tokenizer without."""
    for name in (CONFIG, *names):
        (target / name).write_bytes((source / name).read_bytes().removeprefix(codecs.BOM_UTF8))
    if TOKENIZER not in names:
        _make_tokenizer(source, target / TOKENIZER)


def lowercase(tokenizer: Path) -> None:
    """Makes a tokenizer.json take texts without their capitals, as sentence-transformers does for `do_lower_case`."""
    content = read_json(tokenizer)
    normalizer = content.get("normalizer")
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    if all(step["type"] != "Lowercase" for step in steps):
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
        tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _make_tokenizer(source: Path, target: Path) -> None:
    """Writes tokenizer.json from older files with transformers; warns, with what to do, where that fails."""
    older = [name for name in TOKENIZER_SOURCES if (source / name).is_file()]
    if not older:
        return
    lack = f"{source} has its tokenizer in {', '.join(older)}, and the checkpoint goes without: {TOKENIZER} is"
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        warnings.warn(f"{lack} made of them where transformers is installed: pip install transformers", stacklevel=2)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(target))
    except Exception as error:
        # Each kind of tokenizer fails in its own way, for want of a file or of a package such as sentencepiece.
        target.unlink(missing_ok=True)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"{lack} not made ({reason}): save one beside them with transformers", stacklevel=2)
