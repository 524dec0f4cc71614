"""tokenizer.json made with transformers, for a folder that has its tokenizer in the files of an older form."""

import importlib.util
import json
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .json_file import read_json
from .tokenizer_settings import ADDED_TOKENS, TOKENIZER, TOKENIZER_CONFIG

WORDS, PAIRS, MERGES = "vocab.txt", "vocab.json", "merges.txt"
SENTENCE_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_SOURCES = (WORDS, PAIRS, MERGES, ADDED_TOKENS, *SENTENCE_PIECES)
"""The files of older forms, of which transformers makes tokenizer.json."""
_OTHER_FORMS = ("tekken.json", "*.tiktoken", "tiktoken.model", "tokenizer.model.v*")
_READERS = ("sentencepiece", "protobuf")


def make_tokenizer(source: Path) -> str | None:
    """The text of a tokenizer.json made of the older files of a folder; None, with a warning, where that fails.

    Warns:
        UserWarning: why there is none, and what to do; or what had to be assumed.
    """
    older = [name for name in TOKENIZER_SOURCES if (source / name).is_file()]
    if not set(older) - {ADDED_TOKENS}:
        _warn_of_other_forms(source)
        return None
    lack = f"{source} has its tokenizer in {', '.join(older)}, so the checkpoint has none: {TOKENIZER}"
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        warnings.warn(
            f"{lack} is only made from them if transformers is installed: pip install transformers", stacklevel=3
        )
        return None
    try:
        if PAIRS in older and MERGES not in older and WORDS not in older:
            raise FileNotFoundError(f"{MERGES} is missing: download it too")
        loaded: Any = AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False, local_files_only=True
        )
        made = loaded.backend_tokenizer.to_str()
        _check_vocabulary(source, older, Tokenizer.from_str(made), type(loaded).__name__)
    except Exception as error:
        # Each kind of tokenizer fails in its own way, for want of a file or of a package such as sentencepiece.
        warnings.warn(
            f"{lack} cannot be made ({_reason(error, older)}): save one next to them with transformers", stacklevel=3
        )
        return None
    _warn_of_assumptions(source, older, Tokenizer.from_str(made))
    return made


def _warn_of_other_forms(source: Path) -> None:
    found = sorted(
        file.name for file in source.iterdir() if any(fnmatch(file.name, pattern) for pattern in _OTHER_FORMS)
    )
    if found:
        warnings.warn(
            f"{source} has its tokenizer only in {', '.join(found)}, which is not supported, so the checkpoint "
            f"has none: download {TOKENIZER} too, or save one with the same vocabulary there",
            stacklevel=4,
        )


def _check_vocabulary(source: Path, older: list[str], made: Tokenizer, name: str) -> None:
    """ValueError if the class that transformers took does not read the folder's files: it then has a vocabulary of its
    own, of a few tokens.
    """
    vocabulary = made.get_vocab()
    if WORDS in older and PAIRS not in older:
        lines = (source / WORDS).read_text(encoding="utf-8").split("\n")
        words: list[str] = [line.rstrip("\r") for line in lines if line.rstrip("\r")]
    elif PAIRS in older:
        words = list(read_json(source / PAIRS))
        merges = [line for line in (source / MERGES).read_text(encoding="utf-8").split("\n")[1:] if line.strip()]
        if merges and not json.loads(made.to_str())["model"].get("merges"):
            raise ValueError(f"{name} does not read {MERGES}: set the right tokenizer_class in {TOKENIZER_CONFIG}")
    else:
        return
    if not words:
        raise ValueError(f"{PAIRS if PAIRS in older else WORDS} is empty")
    if lost := [word for word in words if word not in vocabulary]:
        raise ValueError(
            f"{name} reads {len(words) - len(lost)} of the {len(words)} tokens: set the right tokenizer_class in "
            f"{TOKENIZER_CONFIG}"
        )


def _warn_of_assumptions(source: Path, older: list[str], made: Tokenizer) -> None:
    options: Mapping[str, Any] = read_json(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).exists() else {}
    pieces = next((name for name in older if name in SENTENCE_PIECES), None)
    if pieces and "add_bos_token" not in options and not made.encode("").tokens:
        warnings.warn(
            f"{TOKENIZER} is made from {pieces}, and no {TOKENIZER_CONFIG} in {source} sets add_bos_token: nothing is "
            "added before a text, as in transformers; if the model was trained with a token there, set it to true",
            stacklevel=4,
        )


def _reason(error: Exception, older: list[str]) -> str:
    """Why it failed, in a line; transformers names tiktoken where what it lacks are the packages for .model files."""
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    if set(older) & set(SENTENCE_PIECES) and (missing := [name for name in _READERS if not _is_there(modules[name])]):
        return f"reading .model files needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
