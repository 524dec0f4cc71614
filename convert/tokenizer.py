"""The tokenizer of a folder: tokenizer.json checked, and changed as transformers 5 changes it when it loads the folder.

Comes in: a Hugging Face folder and its config. Goes out: the text of the checkpoint's tokenizer.json, which alone then
says what becomes of a text.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import Tokenizer

from ..host.messages import joined, shown
from .json_file import read_json
from .tokenizer_build import check_options, complete, fix_mistral, rebuild
from .tokenizer_classes import CLASSES, SpecialTokens, TokenizerClass, class_of
from .tokenizer_settings import TOKENIZER, TOKENIZER_CONFIG, TokenizerSettings, read_settings

Result = TypeVar("Result")

CONFIG = "config.json"
MAX_ID = 2**22
"""More ids than any vocabulary has."""
PROBES = (
    "",
    "Hello world",
    " a  b   c 12345 6",
    "Ünïcödé Café",
    "日本語 中文",
    "\t'tis\n\nI'll\r\n",
    "ﬁ № \u0301e \U0001f600\u200d",
)
"""Texts that tell tokenizers apart."""


def tokenizer_json(source: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer.json for the checkpoint of a folder: its own text if transformers would change nothing about it.

    Args:
        source: the folder, with tokenizer.json.
        config: of its config.json.

    Raises:
        ValueError: a tokenizer.json that `tokenizers` does not read, or files beside it that ask for what it cannot do.

    Warns:
        UserWarning: the result is another than tokenizer.json alone says, or than the files beside it ask for.
    """
    file = source / TOKENIZER
    content = read_json(file)
    _check_ids(file, content)
    text = file.read_text(encoding="utf-8-sig")
    try:
        plain = _guarded(lambda: _parse(text))
    except ValueError as error:
        raise ValueError(
            f"{shown(file)} cannot be read ({error}): it is damaged, or made for a newer `tokenizers` than "
            f"{tokenizers.__version__}; download it again, or upgrade `tokenizers`"
        ) from error
    settings = read_settings(source, content.get("added_tokens") or [])
    options = settings.options
    check_options(options)
    name = class_of(options, config, byte_level='"ByteLevel"' in text)
    of_class = _class_for(content, name, source)
    special = settings.named_or({**_padding(content), **(of_class.defaults if of_class else {})})

    def build() -> Tokenizer:
        made = rebuild(content, settings, special, of_class) if of_class else complete(text, settings, special)
        fix_mistral(made, options, config)
        made = _parse(made.to_str())
        made.encode_batch(list(PROBES))
        return made

    try:
        made = _guarded(build)
    except ValueError as error:
        raise ValueError(
            f"{shown(source)}: no tokenizer can be made of {TOKENIZER} as a {name} ({error}): see {TOKENIZER_CONFIG}"
        ) from error
    _warn_of_versions(options, source)
    _warn_of_ids(settings, made, source)
    _warn_of_template(options, special, made, source)
    if of_class:
        _warn_of_changes(plain, made, name, source)
    return text if made.to_str() == plain.to_str() else made.to_str()


def check_vocabulary(tokenizer_json: str, rows: int) -> None:
    """Compares the ids of a tokenizer with the rows of the model's embedding.

    Raises:
        ValueError: ordinary text gives ids that the embedding has no rows for.

    Warns:
        UserWarning: only added tokens have such ids.
    """
    tokenizer = _parse(tokenizer_json)
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    names = [f"{token} is {index}" for token, index in sorted(beyond.items(), key=lambda item: item[1])]
    if _ordinary(beyond, tokenizer, json.loads(tokenizer_json)["model"]):
        raise ValueError(
            f"the tokenizer gives ids up to {max(beyond.values())}, and the model's embedding has {rows} rows "
            f"({CONFIG}: vocab_size): one of them belongs to another model; {joined(names)}"
        )
    warnings.warn(
        f"the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the model's embedding, and a text with one "
        f"of them will be refused: {joined(names)}",
        stacklevel=3,
    )


def _ordinary(tokens: Iterable[str], tokenizer: Tokenizer, model: Mapping[str, Any]) -> bool:
    """Whether texts give one of the tokens without having it in so many words."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    always = {model.get("unk_token"), *tokenizer.encode("").tokens}
    others = [token for token in tokens if token not in added]
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        merged = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())}
        others = [token for token in others if len(token) == 1 or token in merged]
    return bool(others) or not always.isdisjoint(tokens)


def _padding(content: Mapping[str, Any]) -> dict[str, str | None]:
    """The token that tokenizer.json pads with, if it does, which transformers takes where nothing names another."""
    padding = content.get("padding")
    return {"pad_token": padding["pad_token"]} if padding else {}


def _class_for(content: Mapping[str, Any], name: str, source: Path) -> TokenizerClass | None:
    """What builds the tokenizer anew, None if tokenizer.json is taken as it is."""
    of_class, kind = CLASSES.get(name), content["model"].get("type")
    if of_class and kind not in of_class.models:
        _warn(
            source,
            f"{TOKENIZER} holds a {kind} model, and transformers reads it with {name}, which is for "
            f"{of_class.models[0]}: it is used unchanged; set tokenizer_class to PreTrainedTokenizerFast in "
            f"{TOKENIZER_CONFIG} to get the same in transformers",
        )
        return None
    return of_class


def _check_ids(file: Path, content: Mapping[str, Any]) -> None:
    """ValueError for an id that no vocabulary reaches: a tokenizer is written with memory for all ids below."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids = vocabulary.values() if isinstance(vocabulary, Mapping) else ()
    added = content.get("added_tokens")
    tokens = added if isinstance(added, list) else ()
    ids = [*ids, *(token.get("id") for token in tokens if isinstance(token, Mapping))]
    if (largest := max((id for id in ids if isinstance(id, int)), default=0)) >= MAX_ID:
        raise ValueError(f"{shown(file)} has a token with id {largest}, expected less than {MAX_ID}")


def _guarded(action: Callable[[], Result]) -> Result:
    """What `tokenizers` gives; whatever goes wrong inside of it becomes a ValueError with the reason in one line."""
    try:
        return action()
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        # It raises plain Exception, and what its Rust code panics with is no Exception at all.
        raise ValueError(shown(str(error).partition("\n")[0] or type(error).__name__)) from error


def _parse(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which cuts nothing off and pads nothing."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _warn_of_versions(options: Mapping[str, Any], source: Path) -> None:
    names = options.get("fast_tokenizer_files")
    if others := [name for name in names if name != TOKENIZER] if isinstance(names, list) else []:
        _warn(
            source,
            f"{TOKENIZER_CONFIG} names {joined(others)} for some versions of transformers, but {TOKENIZER} is used: "
            f"rename the other to {TOKENIZER} if it is the right one",
        )


def _warn_of_ids(settings: TokenizerSettings, made: Tokenizer, source: Path) -> None:
    """Ids of added tokens follow those of the vocabulary without a gap, whatever a file says."""
    other = [
        f"{token.content} has {made.token_to_id(token.content)}, not {index}"
        for index, token in sorted(settings.added.items())
        if made.token_to_id(token.content) != index
    ]
    if other:
        _warn(source, f"added tokens cannot have the ids that files give them, as in transformers: {joined(other)}")


def _warn_of_template(options: Mapping[str, Any], special: SpecialTokens, made: Tokenizer, source: Path) -> None:
    around = made.encode("a").tokens
    for option, name, where, found in (
        ("add_bos_token", "bos_token", "before", around[:1]),
        ("add_eos_token", "eos_token", "after", around[-1:]),
    ):
        token = special.get(name)
        has = token is not None and found == [str(token)]
        if isinstance(asked := options.get(option), bool) and asked != has:
            puts = f"{'adds' if has else 'does not add'} {token or 'such a token'} {where} a text"
            _warn(
                source,
                f"{TOKENIZER_CONFIG} has {option} {str(asked).lower()}, and {TOKENIZER} {puts}: the latter "
                "counts, as in transformers",
            )


def _warn_of_changes(plain: Tokenizer, made: Tokenizer, name: str, source: Path) -> None:
    for text in PROBES:
        now, alone = made.encode(text).tokens, _tokens(plain, text)
        if now != alone:
            _warn(
                source,
                f"transformers reads {TOKENIZER} as a {name}, which tokenizes differently from the file alone, and so "
                f"does the checkpoint: {text!r} becomes {joined(now) or 'nothing'}, not "
                f"{joined(alone) or 'nothing'}",
            )
            break
    kept = {token.content for token in made.get_added_tokens_decoder().values()}
    lost = [token.content for token in plain.get_added_tokens_decoder().values() if token.content not in kept]
    if lost:
        _warn(
            source,
            f"added_tokens_decoder in {TOKENIZER_CONFIG} lacks added tokens of {TOKENIZER}, which then lose their "
            f"meaning, as in transformers: {joined(lost)}",
        )


def _tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    try:
        return _guarded(lambda: tokenizer.encode(text).tokens)
    except ValueError:
        return ["an error"]


def _warn(source: Path, what: str) -> None:
    warnings.warn(f"{shown(source)}: {what}", stacklevel=5)
