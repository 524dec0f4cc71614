"""What the files beside tokenizer.json say of a tokenizer: its options, special and added tokens.

tokenizer_config.json, and special_tokens_map.json and added_tokens.json where the former has no `added_tokens_decoder`;
of several files that name a token, the one that transformers 5 takes is taken here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .json_file import read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _ADDITIONAL, _DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass(frozen=True)
class TokenizerSettings:
    """What a folder asks of its tokenizer.

    Attributes:
        options: the fields of tokenizer_config.json.
        named: special tokens by name (`bos_token`, ...); None where a file says that there is none.
        extra: special tokens without a name; None if no file has a list of them.
        added: added tokens, of which tokenizer.json may lack some, by the id that a file gives them.
    """

    options: Mapping[str, Any]
    named: Mapping[str, Token | None]
    extra: list[Token] | None
    added: Mapping[int, AddedToken]

    def named_or(self, defaults: Mapping[str, str | None]) -> dict[str, Token | None]:
        """The special tokens by name, with those of `defaults` that no file mentions, in transformers' order."""
        every = {**defaults, **self.named}
        order = [*(name for name in NAMED if name in every), *(name for name in every if name not in NAMED)]
        return {name: every[name] for name in order}


def read_settings(folder: Path, in_tokenizer: list[Any]) -> TokenizerSettings:
    """The settings of a folder.

    Args:
        folder: with tokenizer.json.
        in_tokenizer: its `added_tokens`.

    Raises:
        ValueError: a file that is not JSON, or tokens that are not written as transformers writes them.
    """
    options = _read(folder / TOKENIZER_CONFIG)
    fields = {
        name: _plain(value, TOKENIZER_CONFIG, name) for name, value in options.items() if _names_tokens(name, value)
    }
    if not fields.get(_EXTRA) and fields.get(_ADDITIONAL) is not None:
        fields[_EXTRA] = fields.pop(_ADDITIONAL)
    if _DECODER in options:
        added = dict(_decoder_tokens(options[_DECODER]))
    else:
        _merge(fields, _read(folder / SPECIAL_TOKENS_MAP))
        added = dict(_legacy_tokens(_read(folder / ADDED_TOKENS), fields))
        added.update((_id(token.get("id"), TOKENIZER), _token(token, TOKENIZER)) for token in _objects(in_tokenizer))
    if isinstance(fields.get(_EXTRA), dict):
        fields.update(fields.pop(_EXTRA))
    elif _EXTRA not in fields and _ADDITIONAL in fields:
        fields[_EXTRA] = fields[_ADDITIONAL]
    by_content = {token.content: token for token in added.values()}
    extra = fields.pop(_EXTRA, None)
    named = {
        name: by_content.get(str(token), token) if name in NAMED else token
        for name, token in fields.items()
        if name != _ADDITIONAL
    }
    return TokenizerSettings(options, named, extra, added)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _names_tokens(name: str, value: Any) -> bool:
    """Whether a field holds special tokens: a known name, or any other that ends as they do (`image_token`)."""
    return name in (*NAMED, _EXTRA, _ADDITIONAL) or (name.endswith("_token") and isinstance(value, str | dict | None))


def _merge(fields: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
    """Sets what special_tokens_map.json has; its extra tokens join those that there are."""
    for name, value in special_tokens_map.items():
        if not _names_tokens(name, value):
            continue
        tokens = _plain(value, SPECIAL_TOKENS_MAP, name, special=True)
        if name == _EXTRA and isinstance(tokens, list):
            known = fields.get(name)
            known = known if isinstance(known, list) else []
            tokens = [*known, *(token for token in tokens if str(token) not in map(str, known))]
        fields[name] = tokens


def _decoder_tokens(decoder: Any) -> Iterator[tuple[int, AddedToken]]:
    if not isinstance(decoder, dict):
        raise ValueError(f"{TOKENIZER_CONFIG} has {_DECODER} {_short(decoder)}, expected an object with tokens by id")
    for index, token in decoder.items():
        yield _id(index, TOKENIZER_CONFIG), _token(token, TOKENIZER_CONFIG)


def _legacy_tokens(ids: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """The tokens of added_tokens.json, which are special if they have a name or are among the extra ones."""
    extra = fields.get(_EXTRA)
    special = {str(fields[name]) for name in NAMED if fields.get(name)} | set(map(str, extra or ()))
    for content, index in ids.items():
        known = content in special
        yield _id(index, ADDED_TOKENS), AddedToken(content, normalized=not known, special=known)


def _plain(value: Any, file: str, name: str, *, special: bool = False) -> Any:
    """A token or None, a list of tokens, or tokens by name; the latter two for tokens without a name of their own."""
    if name in (_EXTRA, _ADDITIONAL):
        if isinstance(value, list):
            return [_plain(token, file, "", special=True) for token in value]
        if isinstance(value, dict):
            return {key: _plain(token, file, key) for key, token in value.items()}
        if value is not None:
            raise ValueError(f"{file} has {name} {_short(value)}, expected a list of tokens or tokens by name")
        return None
    if isinstance(value, dict):
        return _token(value, file, special=special)
    return None if value is None else _text(value, file)


def _text(value: Any, file: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{file} has {_short(value)} in place of a token, expected its text or an object with content")
    return value


def _token(value: Any, file: str, *, special: bool = False) -> AddedToken:
    """An added token of an object with its text and flags."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{file} has {_short(value)} in place of a token, expected an object with content and flags")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if any(not isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{file} has {_short(value)} in place of a token, expected true or false for its flags")
    return AddedToken(value["content"], **{**flags, **({"special": True} if special else {})})


def _id(value: Any, file: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{file} has {_short(value)} in place of an added token's id, expected an integer from 0")
    return value


def _objects(tokens: list[Any]) -> Iterator[dict[str, Any]]:
    for token in tokens:
        if not isinstance(token, dict):
            raise ValueError(f"{TOKENIZER} has {_short(token)} among its added_tokens, expected objects")
        yield token


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
