"""Tokenizer files as people bring them: the ids of a checkpoint are those of transformers' AutoTokenizer."""

import base64
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import iceformer
from iceformer.convert.auxiliary_files import tokenizer_of
from iceformer.deploy.tokenization import TextTokenizer

from .folders import edit_json, read_json, refused, write_json

TEXTS = (
    "",
    "Hello world 12345",
    "HELLO World don't  STOP 1 12 123",
    "  two  spaces ",
    " lead",
    "tab\tnew\n\nline\r\n",
    "Café déjà ÀÉ e\u0301",
    "日本語 中文",
    "\U0001f600 emoji \U0001f469\u200d\U0001f680",
    "\u00a0nbsp \u2028 sep",
    "a<s>b</s>c <unk>",
    "<x>a <gap>  b<x><x>",
    "[CLS] x [MASK] [SEP]",
    "▁under _x",
    "a" * 150,
    "<|endoftext|> <pad>",
)
PAIR = ("Hello", "world 12")
FAST: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
X: dict[str, Any] = {"content": "<x>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
GAP: dict[str, Any] = {"content": "<gap>", "single_word": True}


def byte_pairs(*, digits: bool = False, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """Byte-level BPE of 296 tokens or so; with `digits`, one by one, as SmolLM and others have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(["Hello world the line of record 12345 don't café"] * 3, trainer)
    if digits:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def sentence_pairs() -> Tokenizer:
    """BPE of characters with bytes to fall back on, as Llama 2 has it."""
    characters = sorted(set("Helowrd12345atin▁éà"))
    pieces = ["▁w", "▁wo", "ld", "He", "ll", "Hell"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *pieces]
    merges = [("▁", "w"), ("▁w", "o"), ("l", "d"), ("H", "e"), ("l", "l"), ("He", "ll")]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_pieces(*, lowercase: bool = False, template: bool = True) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [
        *special,
        "hello",
        "Hello",
        "cafe",
        "Café",
        "world",
        "日",
        "本",
        "語",
        ",",
        ".",
        "1",
        "##2",
        "##3",
        "x",
        "'",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    if template:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁", *"abcodelHwr123", "▁wor", "ld", "▁Hello"]
    scores = [*((token, 0.0) for token in special), *((piece, -float(at)) for at, piece in enumerate(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def cutting() -> Tokenizer:
    """Cuts at 3 tokens and pads to 5 with a token that its vocabulary does not have."""
    tokenizer = byte_pairs()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    return tokenizer


def words_only() -> Tokenizer:
    return Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1, "world": 2}, "[UNK]"))


SIZE = byte_pairs().get_vocab_size()


def decoder_of(*tokens: dict[str, Any], start: int = SIZE) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(start + at): token for at, token in enumerate(tokens)}}


def save(
    folder: Path, tokenizer: Tokenizer, model_type: str = "llama", settings: dict[str, Any] | None = None, **files: Any
) -> Path:
    """A folder with config and tokenizer alone; `files` are further JSON files by name without suffix."""
    write_json(folder / "config.json", {"model_type": model_type})
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        write_json(folder / "tokenizer_config.json", settings)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def prepared(folder: Path, *, rows: int = 10**6) -> TextTokenizer:
    """The tokenizer that a session of the folder's checkpoint would have."""
    text = tokenizer_of(folder, read_json(folder / "config.json"), rows)
    assert text is not None
    settings = folder / "tokenizer_config.json"
    return TextTokenizer(text.encode(), rows, options=settings.read_bytes() if settings.exists() else None)


@contextmanager
def any_warnings() -> Iterator[list[str]]:
    """Collects the messages of warnings, which may be none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages: list[str] = []
        yield messages
        messages.extend(str(warning.message) for warning in caught if warning.category is UserWarning)


CASES: dict[str, tuple[Any, ...]] = {
    "class of another family in Llama": (byte_pairs(digits=True), "llama", {"tokenizer_class": "GPT2Tokenizer"}),
    "no settings": (byte_pairs(digits=True), "llama", None),
    "Llama 3 as LlamaTokenizer": (byte_pairs(digits=True), "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
    "Llama 2": (sentence_pairs(), "llama", {"tokenizer_class": "LlamaTokenizer"}),
    "Llama 2, legacy": (sentence_pairs(), "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Llama 2, no prefix": (sentence_pairs(), "llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "Llama 2, no settings": (sentence_pairs(), "llama", None),
    "Mistral": (sentence_pairs(), "mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Code Llama": (sentence_pairs(), "llama", {"tokenizer_class": "CodeLlamaTokenizer", "fill_token": None}),
    "Gemma": (sentence_pairs(), "gemma2", {"tokenizer_class": "GemmaTokenizer"}),
    "Gemma, no settings": (sentence_pairs(), "gemma3_text", None),
    "GPT-2": (byte_pairs(digits=True), "gpt2", None),
    "GPT-2, prefix": (byte_pairs(), "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "GPT-2 class in Granite": (byte_pairs(digits=True), "granite", {"tokenizer_class": "GPT2Tokenizer"}),
    "prefix asked of no class": (byte_pairs(), "gpt2", {**FAST, "add_prefix_space": True}),
    "GPT-NeoX": (byte_pairs(digits=True), "gpt_neox", {"tokenizer_class": "GPTNeoXTokenizerFast"}),
    "Qwen2 under another name": (byte_pairs(digits=True), "qwen2", {"tokenizer_class": "LlamaTokenizerFast"}),
    "Qwen3": (byte_pairs(), "qwen3", {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["world", "<x>"]}),
    "RoBERTa": (byte_pairs(special=ROBERTA), "roberta", {"add_prefix_space": True, "trim_offsets": False}),
    "ModernBERT": (byte_pairs(digits=True), "modernbert", {"tokenizer_class": "RobertaTokenizer"}),
    "BERT, cased": (word_pieces(), "bert", {"do_lower_case": False}),
    "BERT, lower case against the file": (word_pieces(), "bert", {"do_lower_case": True}),
    "BERT, lower case by default": (word_pieces(), "bert", None),
    "BERT, cased against the file": (word_pieces(lowercase=True), "bert", {"do_lower_case": False}),
    "BERT, accents": (word_pieces(), "bert", {"do_lower_case": False, "strip_accents": True}),
    "BERT, Chinese": (word_pieces(lowercase=True), "bert", {"tokenize_chinese_chars": False}),
    "BERT without a template": (word_pieces(template=False), "bert", {"tokenizer_class": "BertTokenizer"}),
    "BERT, other special tokens": (word_pieces(), "bert", {"cls_token": "<c>", "sep_token": "<d>"}),
    "BERT, taken as it is": (word_pieces(), "bert", {**FAST, "do_lower_case": True}),
    "BERT of whole words": (words_only(), "bert", None),
    "DistilBERT": (word_pieces(), "distilbert", {"tokenizer_class": "DistilBertTokenizer"}),
    "Nomic-BERT": (word_pieces(), "nomic_bert", {"tokenizer_class": "BertTokenizer"}),
    "XLM-RoBERTa": (unigram(), "xlm-roberta", {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": False}),
    "T5": (unigram(), "t5", None),
    "mT5 without sentinels": (unigram(), "mt5", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
    "T5, other tokens": (unigram(), "t5", {"additional_special_tokens": ["<x>", "<extra_id_0>"], "extra_ids": 1}),
    "cut and padded": (cutting(), "llama", {}),
    "cut and padded, built anew": (cutting(), "gpt2", {"model_max_length": 2, "padding_side": "left"}),
    "special tokens split": (byte_pairs(), "llama", {**FAST, "split_special_tokens": True}),
    "added by settings": (byte_pairs(), "llama", {**FAST, **decoder_of(X, GAP)}),
    "added by settings, built anew": (byte_pairs(), "gpt2", decoder_of(X, GAP)),
    "flags changed by settings": (
        byte_pairs(),
        "llama",
        {**FAST, **decoder_of({"content": "<s>", "lstrip": True}, start=1)},
    ),
    "named but not in the vocabulary": (byte_pairs(), "llama", {**FAST, "pad_token": "<x>", "image_token": "<gap>"}),
    "extra tokens": (byte_pairs(), "llama", {**FAST, "additional_special_tokens": ["<x>"]}),
    "extra tokens by name": (byte_pairs(), "llama", {**FAST, "extra_special_tokens": {"boi_token": "<gap>"}}),
    "both lists of extra tokens": (
        byte_pairs(),
        "llama",
        {**FAST, "additional_special_tokens": ["<x>"], "extra_special_tokens": ["<gap>"]},
    ),
    "id that another token has": (byte_pairs(), "llama", {**FAST, **decoder_of(X, start=5)}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ids_are_those_of_transformers(tmp_path: Path, case: tuple[Any, ...]) -> None:
    check_against_transformers(save(tmp_path / "source", *case))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<x>": SIZE, "<gap>": SIZE + 1}},
        {"added_tokens": {"<x>": SIZE}, "special_tokens_map": {"pad_token": "<x>"}},
        {"special_tokens_map": {"bos_token": X, "additional_special_tokens": ["<gap>"]}},
    ],
)
def test_tokens_of_older_files_are_added(tmp_path: Path, model_type: str, files: dict[str, Any]) -> None:
    folder = save(tmp_path / "source", byte_pairs(), model_type, {}, **files)
    check_against_transformers(folder)
    with any_warnings():
        assert len(prepared(folder).encode("<x>").ids) == 1


def check_against_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    with any_warnings():
        reference = AutoTokenizer.from_pretrained(folder)
        tokenizer = prepared(folder)
        pair = reference(*PAIR)
        ids_of = {text: tokenizer.encode(text, add_special_tokens=True).ids.tolist() for text in TEXTS}
        assert ids_of == {text: reference(text)["input_ids"] for text in TEXTS}
        assert tokenizer.encode(*PAIR, add_special_tokens=True).ids.tolist() == pair["input_ids"]
        for ids in ids_of.values():
            assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_file_that_nothing_changes_stays_as_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path, cutting(), "llama", {**FAST, "pad_token": "<unk>"})
    assert tokenizer_of(folder, {"model_type": "llama"}, None) == (folder / "tokenizer.json").read_text()


def test_spaces_before_punctuation(tmp_path: Path) -> None:
    settings = {**FAST, "clean_up_tokenization_spaces": True}
    (tmp_path / "words").mkdir()
    words = Tokenizer(models.WordLevel({"a": 0, ",": 1, "[UNK]": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    cleaned = prepared(save(tmp_path / "words", words, "llama", settings))
    pairs = prepared(save(tmp_path / "pairs", byte_pairs(), "llama", settings))
    assert cleaned.decode([0, 1, 0]) == "a, a"
    assert pairs.decode(pairs.encode("a , a").ids.tolist()) == "a , a"


class TestItIsSaid:
    """What was decided between files that contradict each other, in one line; nothing where they agree."""

    def messages(self, folder: Path) -> list[str]:
        with any_warnings() as messages:
            prepared(folder)
        assert not any("\n" in message for message in messages)
        return messages

    @pytest.mark.parametrize(
        ("tokenizer", "asked", "expected"),
        [
            (sentence_pairs, {"add_bos_token": False}, "add_bos_token false, and tokenizer.json adds <s> before"),
            (sentence_pairs, {"add_eos_token": True}, "add_eos_token true, and tokenizer.json does not add </s> after"),
            (byte_pairs, {"add_bos_token": True}, "add_bos_token true, and tokenizer.json does not add <s> before"),
            (sentence_pairs, {"add_bos_token": True, "add_eos_token": False}, None),
            (byte_pairs, {"add_bos_token": False}, None),
        ],
    )
    def test_which_file_says_what_is_around_a_text(
        self, tmp_path: Path, tokenizer: Any, asked: dict[str, Any], expected: str | None
    ) -> None:
        settings = {**FAST, "bos_token": "<s>", "eos_token": "</s>", **asked}
        found = self.messages(save(tmp_path, tokenizer(), "llama", settings))
        assert len(found) == (expected is not None)
        assert all(expected in message and "tokenizer.json" in message for message in found if expected)

    def test_other_tokens_than_the_file_alone_gives(self, tmp_path: Path) -> None:
        (message,) = self.messages(save(tmp_path, word_pieces(), "bert", {"do_lower_case": True}))
        assert "as a BertTokenizer" in message
        assert "[CLS], hello, world, [SEP], not [CLS], Hello, world, [SEP]" in message

    def test_ids_that_added_tokens_cannot_have(self, tmp_path: Path) -> None:
        (message,) = self.messages(save(tmp_path, byte_pairs(), "llama", {}, added_tokens={"<x>": SIZE + 9}))
        assert f"<x> has {SIZE}, not {SIZE + 9}" in message

    def test_files_for_other_versions(self, tmp_path: Path) -> None:
        names = ["tokenizer.json", "tokenizer.4.0.json"]
        (message,) = self.messages(save(tmp_path, byte_pairs(), "llama", {**FAST, "fast_tokenizer_files": names}))
        assert "names tokenizer.4.0.json" in message

    def test_a_vocabulary_of_another_kind_than_the_class_reads(self, tmp_path: Path) -> None:
        (message,) = self.messages(save(tmp_path, byte_pairs(), "bert"))
        assert "holds a BPE model" in message

    def test_tokens_that_a_list_of_settings_lacks(self, tmp_path: Path) -> None:
        messages = self.messages(save(tmp_path, byte_pairs(), "gpt2", decoder_of(X)))
        assert any(
            "lacks added tokens of tokenizer.json" in message and "<unk>, <s>, </s>" in message for message in messages
        )


class TestIdsBeyondTheEmbedding:
    def test_ordinary_text(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"ids up to {SIZE - 1}, and the model's embedding has 280 rows"):
            prepared(save(tmp_path, byte_pairs(), "llama", FAST), rows=280)

    def test_a_token_that_is_around_every_text(self, tmp_path: Path) -> None:
        tokenizer = byte_pairs()
        tokenizer.add_special_tokens(["<x>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="<x> $A", special_tokens=[("<x>", SIZE)])
        with pytest.raises(ValueError, match=f"<x> is {SIZE}"):
            prepared(save(tmp_path, tokenizer, "llama", FAST), rows=SIZE)

    def test_added_tokens(self, tmp_path: Path) -> None:
        folder = save(tmp_path, byte_pairs(), "llama", {**FAST, **decoder_of(X)})
        with pytest.warns(UserWarning, match=f"1 tokens beyond the {SIZE} rows .*: <x> is {SIZE}"):
            tokenizer = prepared(folder, rows=SIZE)
        assert tokenizer.encode("Hello").ids.size
        with pytest.raises(ValueError, match=f"gives '<x>' the id {SIZE}, but the model has {SIZE} ids"):
            tokenizer.encode("Hello<x>")

    def test_byte_pairs_that_nothing_merges(self, tmp_path: Path) -> None:
        folder = save(tmp_path, byte_pairs(), "llama", FAST)
        content = read_json(folder / "tokenizer.json")
        content["model"]["vocab"]["unmerged"] = SIZE
        write_json(folder / "tokenizer.json", content)
        with pytest.warns(UserWarning, match=f"unmerged is {SIZE}"):
            prepared(folder, rows=SIZE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds a list"),
        ("{}", "Model missing"),
        ('{"version": "1.0", "model": ', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": "9.0"}', "Unknown tokenizer version '9.0'.*newer `tokenizers`"),
        (
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Future"}}',
            "cannot be read",
        ),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "cannot be read"),
        (word_pieces(template=False).to_str().replace('"unk_token":"[UNK]"', '"unk_token":"<none>"'), "can be made"),
    ],
)
def test_a_tokenizer_that_is_damaged_or_new_is_refused(
    tiny_llama: Path, tmp_path: Path, content: str, expected: str
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    (source / "tokenizer.json").write_text(content)
    message = refused(source)
    assert "\n" not in message
    assert re.search(expected, message)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"added_tokens_decoder": {"x": X}}, "'x' in place of an added token's id"),
        ({"added_tokens_decoder": {"400": "<x>"}}, "'<x>' in place of a token"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder \[\], expected an object"),
        ({"bos_token": 3}, "3 in place of a token"),
        ({"extra_special_tokens": "<x>"}, "expected a list of tokens or tokens by name"),
        ({"do_lower_case": "yes"}, "do_lower_case 'yes', expected true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    folder = save(tmp_path, word_pieces(), "bert", settings)
    with pytest.raises(ValueError, match=f"tokenizer_config.json has .*{expected}|{expected}"):
        prepared(folder)


class TestOtherForms:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        write_json(tmp_path / "config.json", {"model_type": "llama"})
        return tmp_path

    def message(self, source: Path) -> str:
        with any_warnings() as messages:
            assert tokenizer_of(source, read_json(source / "config.json"), None) is None
        (message,) = messages
        assert "the checkpoint has none" in message
        return message

    @pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "tokenizer.model.v3"])
    def test_that_are_not_read(self, source: Path, name: str) -> None:
        lines = (base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
        (source / name).write_bytes(b"\n".join(lines))
        assert name in self.message(source)

    def test_packages_that_read_sentence_pieces(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (source / "tokenizer.model").write_bytes(b"\n\x05")
        monkeypatch.setattr("iceformer.convert.older_tokenizers._is_there", lambda module: module != "sentencepiece")
        assert "needs sentencepiece: pip install sentencepiece" in self.message(source)

    @pytest.mark.parametrize(
        ("model_type", "files", "expected"),
        [
            ("gpt2", {"vocab.json": '{"a": 0, "b": 1}'}, "merges.txt is missing"),
            ("gpt2", {"vocab.txt": "[UNK]\nthe\n"}, "GPT2Tokenizer reads 0 of the 2 tokens"),
            ("bert", {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#\na b\n"}, "BertTokenizer does not read"),
            ("bert", {"vocab.txt": ""}, "vocab.txt is empty"),
        ],
    )
    def test_files_that_the_class_does_not_read(
        self, source: Path, model_type: str, files: dict[str, str], expected: str
    ) -> None:
        write_json(source / "config.json", {"model_type": model_type})
        for name, text in files.items():
            (source / name).write_text(text)
        assert expected in self.message(source)

    def test_added_tokens_alone_are_no_tokenizer(self, source: Path) -> None:
        write_json(source / "added_tokens.json", {"<x>": 5})
        assert tokenizer_of(source, {"model_type": "bert"}, None) is None


def test_templates_and_settings_travel_to_the_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    templates = {
        "chat_template.jinja": "{{ 'ä\u2028' }}\r\n",
        "chat_templates/tool use.jinja": "{% for message in messages %}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "chat_template.json": '{"chat_template": "x"}',
    }
    for name, text in templates.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(text.encode())
    edit_json(
        source / "tokenizer_config.json", **FAST, chat_template="{{ a }}", pad_token="<x>", split_special_tokens=True
    )
    checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    artifact = iceformer.compile(
        checkpoint, tmp_path / "artifact", buckets=(16,), attention=iceformer.Exact(), chunk=16
    )
    for name in (*templates, "tokenizer_config.json"):
        assert (artifact / name).read_bytes() == (checkpoint / name).read_bytes() == (source / name).read_bytes()
    session = iceformer.load(artifact)
    assert session.tokenize("<x>").size == 3
    assert session.detokenize(session.tokenize("the <x>")) == "the <x>"
    assert json.loads((artifact / "tokenizer.json").read_text())["added_tokens"][-1]["content"] == "<x>"
