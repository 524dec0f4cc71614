"""The tokenizer classes of transformers 5 that take the vocabulary of tokenizer.json and build the rest anew.

`class_of` says which class `AutoTokenizer` would take for a folder; a `TokenizerClass` says what that one builds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, processors

Options = Mapping[str, Any]
Sections = dict[str, Any]
SpecialTokens = Mapping[str, Any]

_BERT_CLASSES = (
    "DistilBertTokenizer",
    "BertTokenizer",
    "ElectraTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
    "LayoutLMTokenizer",
)
_ROBERTA_CLASSES = ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer", "MvpTokenizer")
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
_REGISTERED = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "granite": "TokenizersBackend",
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "modernbert": "TokenizersBackend",
    "mt5": "T5Tokenizer",
    "nomic_bert": "BertTokenizer",
    "olmo2": "TokenizersBackend",
    "phi3": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "stablelm": "TokenizersBackend",
    "t5": "T5Tokenizer",
    "umt5": "TokenizersBackend",
    "xlm-roberta": "XLMRobertaTokenizer",
}
"""The class of each model type, as transformers 5.24 has them."""
_DECLARED_WRONGLY = ("modernbert", "phi3", "qwen2")
"""Model types whose folders name wrong classes so often that transformers takes the registered one."""
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerClass:
    """What a class makes of a vocabulary, whatever tokenizer.json holds beside it.

    Attributes:
        models: the kinds of vocabulary it can read, as `type` in tokenizer.json, and first the one that it makes.
        sections: gives normalizer, pre-tokenizer, decoder and the model's options in the form of tokenizer.json.
        defaults: its special tokens where the folder does not name them.
        post_processor: makes its own of the tokenizer and the special tokens; None keeps that of tokenizer.json.
        extra: further special tokens where the folder names none.
        marks_special: whether every special token is marked as one at the end, even a token of the vocabulary.
    """

    models: tuple[str | None, ...]
    sections: Callable[[Options, SpecialTokens], Sections]
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    post_processor: Callable[[Tokenizer, Options, SpecialTokens], Any] | None = None
    extra: Callable[[Options], list[str]] = lambda options: []
    marks_special: bool = False


def class_of(options: Options, config: Options, *, byte_level: bool) -> str:
    """The name of the class that `AutoTokenizer` takes, without `Fast`; "TokenizersBackend" takes a file as it is.

    Args:
        options: of tokenizer_config.json.
        config: of config.json.
        byte_level: whether tokenizer.json names `ByteLevel`.
    """
    declared = options.get("tokenizer_class") or config.get("tokenizer_class")
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else None
    model_type = str(config.get("model_type"))
    registered, overruled = _REGISTERED.get(model_type), model_type in _DECLARED_WRONGLY
    if declared == "LlamaTokenizer" and byte_level and not overruled:
        name = None
    elif declared is None or declared == registered:
        name = registered
    elif registered is None:
        name = declared
    elif registered == "TokenizersBackend":
        name = None
    else:
        name = registered if overruled else declared
    return "TokenizersBackend" if name is None or name in _GENERIC else name


def surround(bos: tuple[str, int] | None = None) -> Any:
    """The post-processor that puts a token in front of each text, or nothing at all."""
    front, second = (f"{bos[0]}:0 ", f"{bos[0]}:1 ") if bos else ("", "")
    return processors.TemplateProcessing(
        single=f"{front}$A:0", pair=f"{front}$A:0 {second}$B:1", special_tokens=[bos] if bos else []
    )


def _byte_level(add_prefix_space: Any, *, use_regex: bool = True) -> Sections:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _metaspace(prepend: str, *, split: bool = True) -> Sections:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": split}


def _sequence(kind: str, *parts: Sections) -> Sections:
    return {"type": "Sequence", kind: list(parts)}


def _replace(pattern: str, content: str) -> Sections:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


_BYTE_LEVEL_DECODER = _byte_level(True)
_BYTE_PAIRS: Sections = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_SENTENCE_PIECES = _BYTE_PAIRS | {
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
}
_PIECES_DECODER = (_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"})
_STRIP_FIRST: Sections = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _bert(options: Options, special: SpecialTokens) -> Sections:
    return {
        "model": {
            "unk_token": str(special["unk_token"]),
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": options.get("tokenize_chinese_chars", True),
            "strip_accents": options.get("strip_accents"),
            "lowercase": options.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }


def _bert_post_processor(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    cls, sep = str(special["cls_token"]), str(special["sep_token"])
    return processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[_with_id(tokenizer, cls), _with_id(tokenizer, sep)],
    )


def _gpt2(options: Options, special: SpecialTokens) -> Sections:
    return {
        "model": _BYTE_PAIRS,
        "normalizer": None,
        "pre_tokenizer": _byte_level(options.get("add_prefix_space", False)),
        "decoder": _BYTE_LEVEL_DECODER,
    }


def _gpt_neox(options: Options, special: SpecialTokens) -> Sections:
    pre_tokenizer = _gpt2(options, special)["pre_tokenizer"] | {"trim_offsets": options.get("trim_offsets", True)}
    return _gpt2(options, special) | {"normalizer": {"type": "NFC"}, "pre_tokenizer": pre_tokenizer}


def _nothing_around(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    return surround()


def _roberta_post_processor(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    return processors.RobertaProcessing(
        _with_id(tokenizer, str(special["sep_token"])),
        _with_id(tokenizer, str(special["cls_token"])),
        options.get("trim_offsets", True),
        options.get("add_prefix_space", False),
    )


def _qwen2(options: Options, special: SpecialTokens) -> Sections:
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    prefix_space = options.get("add_prefix_space")
    bytes_ = _byte_level(False if prefix_space is None else prefix_space, use_regex=False)
    return {
        "model": _BYTE_PAIRS,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _sequence("pretokenizers", split, bytes_),
        "decoder": _BYTE_LEVEL_DECODER,
    }


def _llama(options: Options, special: SpecialTokens) -> Sections:
    prefix_space = options.get("add_prefix_space")
    prefix_space = True if prefix_space is None else bool(prefix_space)
    prepend = ("always" if options.get("legacy", False) else "first") if prefix_space else "never"
    return {
        "model": _SENTENCE_PIECES,
        "normalizer": None,
        "pre_tokenizer": _metaspace(prepend, split=False),
        "decoder": _sequence("decoders", *_PIECES_DECODER, *([_STRIP_FIRST] if prefix_space else [])),
    }


def _code_llama(options: Options, special: SpecialTokens) -> Sections:
    prefix_space = options.get("add_prefix_space", True)
    return {
        "model": _SENTENCE_PIECES | {"unk_token": str(special["unk_token"])},
        "normalizer": None,
        "pre_tokenizer": _metaspace("first" if prefix_space in (None, True) else "never", split=False),
        "decoder": _sequence("decoders", *_PIECES_DECODER, _STRIP_FIRST),
    }


def _bos_in_front(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    bos = special["bos_token"]
    return surround(None if bos is None else _with_id(tokenizer, str(bos)))


def _gemma(options: Options, special: SpecialTokens) -> Sections:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "model": _SENTENCE_PIECES | {"unk_token": str(special["unk_token"])},
        "normalizer": _replace(" ", "▁"),
        "pre_tokenizer": split,
        "decoder": _sequence("decoders", *_PIECES_DECODER),
    }


def _unigram(unk_id: int, charsmap: Any, prepend: str) -> Sections:
    return {
        "model": {"unk_id": unk_id, "byte_fallback": False},
        "normalizer": charsmap,
        "pre_tokenizer": _sequence("pretokenizers", {"type": "WhitespaceSplit"}, _metaspace(prepend)),
        "decoder": _metaspace(prepend),
    }


def _t5(options: Options, special: SpecialTokens) -> Sections:
    return _unigram(2, options["precompiled"], "always")


def _t5_post_processor(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    _, eos = _with_id(tokenizer, str(special["eos_token"]))
    return processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", eos)]
    )


def _sentinels(options: Options) -> list[str]:
    return [f"<extra_id_{index}>" for index in range(options.get("extra_ids", 100))]


def _xlm_roberta(options: Options, special: SpecialTokens) -> Sections:
    return _unigram(3, options["precompiled"], "always" if options.get("add_prefix_space", True) else "never")


def _xlm_roberta_post_processor(tokenizer: Tokenizer, options: Options, special: SpecialTokens) -> Any:
    bos, eos = str(special["bos_token"]), str(special["eos_token"])
    return processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", eos, eos, "$B", eos],
        special_tokens=[_with_id(tokenizer, bos), _with_id(tokenizer, eos)],
    )


def _with_id(tokenizer: Tokenizer, token: str) -> tuple[str, int]:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"{token!r} is no token of the vocabulary")
    return token, index


# Old files do not name their kind.
_WORDS, _PAIRS, _UNIGRAM = ("WordPiece", "WordLevel", None), ("BPE", None), ("Unigram", None)
_BRACKETS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ANGLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_END_OF_TEXT = {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}

CLASSES: dict[str, TokenizerClass] = {
    **dict.fromkeys(_BERT_CLASSES, TokenizerClass(_WORDS, _bert, _BRACKETS, _bert_post_processor)),
    **dict.fromkeys(_ROBERTA_CLASSES, TokenizerClass(_PAIRS, _gpt2, _ANGLES, _roberta_post_processor)),
    "GPT2Tokenizer": TokenizerClass(_PAIRS, _gpt2, _END_OF_TEXT | {"pad_token": None}),
    "GPTNeoXTokenizer": TokenizerClass(_PAIRS, _gpt_neox, _END_OF_TEXT | {"pad_token": "<|padding|>"}, _nothing_around),
    "Qwen2Tokenizer": TokenizerClass(
        _PAIRS,
        _qwen2,
        {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        marks_special=True,
    ),
    "LlamaTokenizer": TokenizerClass(_PAIRS, _llama, _LLAMA_TOKENS),
    "CodeLlamaTokenizer": TokenizerClass(
        _PAIRS, _code_llama, _LLAMA_TOKENS | _INFILLING, _bos_in_front, lambda options: list(_INFILLING.values())
    ),
    "GemmaTokenizer": TokenizerClass(
        _PAIRS,
        _gemma,
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "T5Tokenizer": TokenizerClass(
        _UNIGRAM,
        _t5,
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        _t5_post_processor,
        _sentinels,
    ),
    "XLMRobertaTokenizer": TokenizerClass(_UNIGRAM, _xlm_roberta, _ANGLES, _xlm_roberta_post_processor),
}
"""By name. Every other class of transformers, and a name that it does not know, takes tokenizer.json as it is."""
