"""Building the tokenizer that transformers 5 would have of a tokenizer.json and the settings beside it."""

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from .tokenizer_classes import SpecialTokens, TokenizerClass
from .tokenizer_settings import TOKENIZER_CONFIG, Token, TokenizerSettings

_SWITCHES = (
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "add_prefix_space",
    "trim_offsets",
    "legacy",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
)
_MISTRAL_MODELS = (None, "mistral", "mistral3", "voxtral", "ministral", "pixtral")
_MISTRAL_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError if an option of tokenizer_config.json that is read here has a value of a wrong type."""
    for name in _SWITCHES:
        if not isinstance(value := options.get(name), bool | None):
            raise ValueError(f"{TOKENIZER_CONFIG} has {name} {value!r}, expected true or false")
    if type(value := options.get("extra_ids", 0)) is not int:
        raise ValueError(f"{TOKENIZER_CONFIG} has extra_ids {value!r}, expected an integer")


def complete(text: str, settings: TokenizerSettings, special: SpecialTokens) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with the tokens that only other files name."""
    tokenizer = Tokenizer.from_str(text)
    _add_tokens(tokenizer, settings, special, settings.extra or [])
    return tokenizer


def rebuild(
    content: Mapping[str, Any], settings: TokenizerSettings, special: SpecialTokens, of_class: TokenizerClass
) -> Tokenizer:
    """The tokenizer that a class of transformers makes of the vocabulary in a tokenizer.json."""
    options = {**settings.options, "precompiled": _precompiled(content.get("normalizer"))}
    extra = of_class.extra(options) if settings.extra is None else settings.extra
    sections = of_class.sections(options, special)
    model = {"type": of_class.models[0], **sections["model"]}
    model |= {name: content["model"][name] for name in ("vocab", "merges") if name in content["model"]}
    tokenizer = Tokenizer.from_str(json.dumps({**content, **sections, "model": model, "added_tokens": []}))
    _add_tokens(tokenizer, settings, special, extra)
    if of_class.marks_special:
        every = dict.fromkeys(str(token) for token in (*special.values(), *extra) if token is not None)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in every])
    if of_class.post_processor:
        tokenizer.post_processor = of_class.post_processor(tokenizer, options, special)
    return tokenizer


def fix_mistral(tokenizer: Tokenizer, options: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Splits words as Mistral's own tokenizer does, where `fix_mistral_regex` asks for it of a file with the fault."""
    if options.get("fix_mistral_regex") is True and _has_mistral_fault(tokenizer, config):
        _split_as_mistral(tokenizer)


def _precompiled(normalizer: Any) -> Any:
    """The table of characters of SentencePiece among the normalizers, or None."""
    if not isinstance(normalizer, dict):
        return None
    parts = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    return next((part for part in parts or () if part.get("type") == "Precompiled"), None)


def _add_tokens(
    tokenizer: Tokenizer, settings: TokenizerSettings, special: SpecialTokens, extra: Sequence[Token]
) -> None:
    """Adds what the tokenizer lacks, in transformers' order: by id, by name, then the rest."""
    present = tokenizer.get_added_tokens_decoder().values()
    known = {repr(token) for token in present}
    tokens: list[Token] = [token for _, token in sorted(settings.added.items()) if repr(token) not in known]
    contents = {token.content for token in present} | {str(token) for token in tokens}
    for token in (*special.values(), *extra):
        if token is not None and str(token) not in contents:
            tokens.append(token)
            contents.add(str(token))
    named = {str(token) for token in special.values() if token is not None}
    # What is special once stays special in a tokenizer, whatever is added later.
    kept = {token.content for token in present if token.special}
    tokenizer.add_tokens([_flagged(token, named, kept) for token in tokens])


def _flagged(token: Token, named: Container[str], kept: Container[str]) -> AddedToken:
    """The token to add, special if it has a name, or no flags of its own, or was special before."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if token.content in named:
        token.special = True
    elif token.content in kept:
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(token.content, **flags, special=True)
    return token


def _has_mistral_fault(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether transformers would take it for one of Mistral's that an old version saved with a wrong split."""
    major = str(config.get("transformers_version") or "0").partition(".")[0]
    old = not major.isdecimal() or int(major) < 5
    large = tokenizer.get_vocab_size() > 100_000 and tokenizer.pre_tokenizer is not None
    return large and old and config.get("model_type") in _MISTRAL_MODELS


def _split_as_mistral(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(_MISTRAL_SPLIT), behavior="isolated")
    current: Any = tokenizer.pre_tokenizer
    if isinstance(current, pre_tokenizers.Sequence):
        current[0] = split
        return
    if isinstance(current, pre_tokenizers.Metaspace):
        current = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, current])
