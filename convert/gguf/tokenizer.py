"""A tokenizer from the metadata of a GGUF file: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

Ids are those that llama.cpp gives, and so those of the model's own tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...host.messages import shown

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What SentencePiece's vocabularies have where the file does not say it.
_DEFAULT_IDS = {"llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0}}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Tokens at which llama.cpp ends a text by what they are called, because most files have no eot_token_id.
_ENDS_BY_NAME = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
    "<end_of_utterance>",
}
# Phi-3's other special tokens take the white space behind them.
_PHI3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_WITH_SLASH}"
_GPT4O = rf"{_LOWER}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before pairs are merged.

    Attributes:
        patterns: regular expressions; each cuts what the one before it left into what matches and what lies between.
        whole_words: whether a piece that is a token as a whole is taken without merging.
        adds_bos: whether the beginning of a text is marked where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


def _named(names: str, *patterns: str, **options: bool) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(patterns, **options))


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum exaone4", _GPT2),
    **_named("mpt olmo jais trillion granite-docling modern-bert", _GPT2),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b", r"\p{N}", _GPT2),
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA3, whole_words=True, adds_bos=True
    ),
    **_named("dbrx smaug-bpe chatglm-bpe glm4", _LLAMA3),
    **_named("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2", _QWEN2),
    **_named("tekken", _TEKKEN, whole_words=True, adds_bos=True),
    **_named("gpt-4o llama4 kanana2", _GPT4O),
    **_named("seed-coder", _SEED),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""By what `tokenizer.ggml.pre` says."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens.

    Attributes:
        kind: "gpt2" or "llama", or another that is not built.
        tokens: their texts, by id.
        types: their types, by id.
        metadata: of the file.
    """

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """What `tokenizer.ggml.` and a name has; the default if there is none, or one of another type."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        return value if default is None or type(value) is type(default) else default

    def id_of(self, name: str) -> int | None:
        """The id of bos_token, eos_token, unk_token or pad_token; None for none."""
        found = self._id(_SPECIAL_IDS[name])
        return _DEFAULT_IDS.get(self.kind, {}).get(name) if found is None else found

    def ends(self) -> list[int]:
        """The ids at which a text ends: the file's own first, then those that llama.cpp knows by their names."""
        given = [self.id_of("eos_token"), *(self._id(name) for name in _ENDS[1:])]
        named = [index for index, token in enumerate(self.tokens) if token in _ENDS_BY_NAME]
        return list(dict.fromkeys(index for index in (*given, *named) if index is not None))

    def adds(self, name: str) -> bool:
        """Whether "bos" is put before a text, or "eos" behind it."""
        pre = PRE_TOKENIZERS.get(str(self.get("pre")))
        default = name == "bos" and (self.kind == "llama" or (pre is not None and pre.adds_bos))
        return self.get(f"add_{name}_token", default) and self.id_of(f"{name}_token") is not None

    def _id(self, key: str) -> int | None:
        found = self.get(key)
        return found if type(found) is int and 0 <= found < len(self.tokens) else None


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a file; None for a file without.

    Raises:
        ValueError: types that do not fit the tokens.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(kind, str) or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return None
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        named = {metadata.get(f"tokenizer.ggml.{key}") for key in (*_SPECIAL_IDS.values(), *_ENDS)}
        types = [_guessed_type(token, index in named) for index, token in enumerate(tokens)]
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.token_type does not have one type for each token")
    return Vocabulary(kind, tokens, types, metadata)


def build_tokenizer(vocabulary: Vocabulary, *, architecture: str) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
        ValueError: what cannot be built, and why.
    """
    ready = vocabulary.metadata.get("tokenizer.huggingface.json")
    if isinstance(ready, str):
        return Tokenizer.from_str(ready)
    if vocabulary.kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    else:
        raise ValueError(f"tokenizer.ggml.model is {shown(repr(vocabulary.kind))}, supported: 'gpt2' and 'llama'")
    _add_tokens(tokenizer, vocabulary, strips=architecture == "phi3" and vocabulary.kind == "llama")
    tokenizer.post_processor = _post_processor(vocabulary)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    name, merges = vocabulary.get("pre"), vocabulary.get("merges")
    pre = PRE_TOKENIZERS.get("default" if name is None else str(name))
    if pre is None:
        raise ValueError(f"tokenizer.ggml.pre is {shown(repr(name))}, which is not known")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError("it has no tokenizer.ggml.merges")
    model = models.BPE(
        vocab=_ids(vocabulary),
        merges=_pairs(merges),
        ignore_merges=pre.whole_words,
    )
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ValueError("tokenizer.ggml.scores does not have one score for each token")
    unknown = vocabulary.id_of("unk_token")
    model = models.BPE(
        vocab=_ids(vocabulary),
        merges=_merges(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=vocabulary.types.count(_BYTE) == 256,
    )
    tokenizer = Tokenizer(model)
    prefixed = vocabulary.get("add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Ids by token; those that only fill the vocabulary up are left out."""
    ids: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == _UNUSED:
            continue
        if token in ids:
            raise ValueError(f"tokens {ids[token]} and {index} are both {shown(repr(token))}")
        ids[token] = index
    return ids


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Both halves of each merge, which a space separates; the first character may be a space itself."""
    ends = ((merge, merge.find(" ", 1)) for merge in merges)
    return [(merge[:end], merge[end + 1 :]) for merge, end in ends]


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs that make up a token, by its score: SentencePiece merges the pair whose token has the highest."""
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    normal = {token: index for index, (token, kind) in enumerate(kinds) if kind == _NORMAL}
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(normal.items(), key=lambda item: (-scores[item[1]], item[1])):
        halves = ((token[:end], token[end:]) for end in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in normal and pair[1] in normal]
        merges += sorted(pairs, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return merges


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, *, strips: bool) -> None:
    """Adds what is matched in a text as it is, before anything else: special tokens and the user's own."""
    special, own = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if not token or kind == _UNUSED:
            continue
        # Those that end a text are no text whatever their type.
        if kind in (_CONTROL, _UNKNOWN) or token in _ENDS_BY_NAME:
            special.append(
                AddedToken(token, normalized=False, special=True, rstrip=strips and token not in _PHI3_PLAIN)
            )
        elif kind == _USER_DEFINED:
            own.append(AddedToken(token, normalized=False, special=False, rstrip=strips and token == "</s>"))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(own)


def _post_processor(vocabulary: Vocabulary) -> Any:
    ids = {name: vocabulary.id_of(f"{name}_token") for name in ("bos", "eos") if vocabulary.adds(name)}
    before, behind = ([name] if name in ids else [] for name in ("bos", "eos"))

    def template(*sequences: str) -> list[str]:
        return [f"{piece}:{kind}" for kind, text in enumerate(sequences) for piece in (*before, f"${text}", *behind)]

    return processors.TemplateProcessing(
        single=template("A"),
        pair=template("A", "B"),
        special_tokens=[
            {"id": name, "ids": [index], "tokens": [vocabulary.tokens[index]]}
            for name, index in ids.items()
            if index is not None
        ],
    )


def _guessed_type(token: str, named: bool) -> int:
    """The type of a token in a file without types."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return _BYTE
    return _CONTROL if named else _NORMAL
