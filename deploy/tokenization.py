"""Text to token ids and back, with the tokenizer.json of an artifact."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import ArtifactError

_SHOWN = 40
_WORD_START = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
"""What `clean_up_tokenization_spaces` replaces, in transformers' order."""


@dataclass(frozen=True)
class Cut:
    """Texts are cut at so many tokens, special tokens included, and lose them at one side, "right" or "left"."""

    tokens: int
    side: str


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a text, or of a pair of texts.

    Attributes:
        ids: int32 [n].
        type_ids: int32 [n], the segment of each.
        offsets: int32 [n, 2], where in its text each begins and ends, in characters.
        sequence: int32 [n], which text of a pair each is of; -1 for special tokens that stand around the texts.
        truncated: whether others of the texts were cut off.
    """

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    sequence: NDArray[np.int32]
    truncated: bool

    def chosen(self, kept: NDArray[np.bool_]) -> "Tokens":
        """Some of the tokens."""
        return Tokens(self.ids[kept], self.type_ids[kept], self.offsets[kept], self.sequence[kept], self.truncated)


class TextTokenizer:
    """A tokenizer without padding, and without truncation but that of `cut`.

    Args:
        data: tokenizer.json.
        vocab_size: ids that the model has; None for a model that takes no ids.
        cut: what becomes of long texts.
        options: tokenizer_config.json, of which two options are no part of tokenizer.json: `split_special_tokens` and
            `clean_up_tokenization_spaces`; None if there is none.

    Raises:
        ArtifactError: a file cannot be read.
    """

    def __init__(
        self, data: bytes, vocab_size: int | None, cut: Cut | None = None, *, options: bytes | None = None
    ) -> None:
        from tokenizers import Tokenizer

        self._vocab_size = vocab_size
        try:
            settings = json.loads(options or b"{}")
            self._tokenizer = Tokenizer.from_str(data.decode())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
            self._cleans_up = _cleans_up(settings, type(self._tokenizer.model).__name__)
            added = self._tokenizer.get_added_tokens_decoder().values()
            self._special = frozenset(token.content for token in added if token.special)
            if cut is not None:
                # Of a pair, the longer text loses tokens first.
                self._tokenizer.enable_truncation(cut.tokens, strategy="longest_first", direction=cut.side)
        except BaseException as error:
            raise ArtifactError(
                f"tokenizer.json cannot be read ({_reason(error)}): convert the source again, with one that "
                "the package tokenizers can read"
            ) from error

    def encode(self, *texts: str, add_special_tokens: bool | None = None) -> Tokens:
        """The tokens of a text or of a pair.

        Args:
            texts: one or two.
            add_special_tokens: None puts the tokenizer's special tokens around them, except those that the first begins
                with or the last ends with already; True puts all of them there; False none.

        Raises:
            ValueError: what is no text, or a token that the model does not have.
        """
        for text in texts:
            _check_text(text)
        try:
            first, second = (*texts, None)[:2]
            encoded = self._tokenizer.encode(first, second, add_special_tokens=add_special_tokens is not False)
        except BaseException as error:
            raise ValueError(f"tokenizer.json cannot encode {texts[0][:_SHOWN]!r} ({_reason(error)})") from error
        sequence = [-1 if of is None else of for of in encoded.sequence_ids]
        tokens = Tokens(
            np.asarray(encoded.ids, np.int32),
            np.asarray(encoded.type_ids, np.int32),
            np.asarray(encoded.offsets, np.int32).reshape(-1, 2),
            np.asarray(sequence, np.int32),
            bool(encoded.overflowing),
        )
        self._check_ids(tokens.ids)
        return _once(tokens) if add_special_tokens is None else tokens

    def prompt_tokens(self, prompt: str, *, add_special_tokens: bool | None = True) -> int:
        """How many tokens a prompt takes at the beginning of a text: as sentence-transformers counts them, those of the
        prompt alone, without a special token at their end.
        """
        if not prompt:
            return 0
        ids = self.encode(prompt, add_special_tokens=add_special_tokens).ids
        return len(ids) - (ids.size > 0 and self.token(int(ids[-1])) is None)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; ValueError if the tokenizer has none for them."""
        return self.clean_up(self.decode_as_is(ids))

    def decode_as_is(self, ids: list[int]) -> str:
        """As `decode`, without what `clean_up_tokenization_spaces` replaces."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            raise ValueError(f"tokenizer.json cannot decode {str(ids)[:_SHOWN]} ({_reason(error)})") from error

    def clean_up(self, text: str) -> str:
        """The text after what `clean_up_tokenization_spaces` replaces, if the tokenizer has it."""
        if self._cleans_up:
            for spaced, cleaned in _CLEANED:
                text = text.replace(spaced, cleaned)
        return text

    @property
    def cleaned_characters(self) -> frozenset[str]:
        """All characters of what `clean_up` replaces; empty if it replaces nothing."""
        return frozenset().union(*(spaced for spaced, _ in _CLEANED)) if self._cleans_up else frozenset()

    def token(self, id: int) -> str | None:
        """The token of an id as the vocabulary has it; None for one that `decode` leaves out, ValueError as there."""
        try:
            token = self._tokenizer.id_to_token(id)
        except BaseException as error:
            raise ValueError(f"tokenizer.json cannot decode {str(id)[:_SHOWN]} ({_reason(error)})") from error
        return None if token in self._special else token

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token alone, which may be a part of a character; those of its name for a special token,
        and none for an id that the tokenizer does not have.
        """
        token = self.token(id)
        if token is None:
            return (self._tokenizer.id_to_token(id) or "").encode()
        kinds = self._decoder_kinds
        if "ByteLevel" in kinds and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(_WORD_START, " ").encode()

    @property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """What makes text of tokens, step by step, as tokenizer.json describes it; empty if nothing does."""
        decoder = self._tokenizer.decoder
        return [] if decoder is None else _steps(json.loads(decoder.__getstate__()))  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def _decoder_kinds(self) -> frozenset[str]:
        return frozenset(step["type"] for step in self.decoder_steps)

    def _check_ids(self, ids: NDArray[np.int32]) -> None:
        limit = self._vocab_size
        if limit is not None and ids.size and ids.max() >= limit:
            beyond = int(ids.max())
            raise ValueError(
                f"tokenizer.json gives {self._tokenizer.id_to_token(beyond)!r} the id {beyond}, but the model has "
                f"{limit} ids: leave it out of the text, if the tokenizer belongs to this model"
            )


def _byte_alphabet() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for, as in GPT-2's encoder: printable ones for
    themselves, the others in order from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _cleans_up(settings: dict[str, Any], model: str) -> bool:
    """Whether spaces before punctuation go away in decoded text; of byte pairs, the model wrote them, and they stay."""
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
    return settings.get("clean_up_tokenization_spaces") is True and (model != "BPE" or forced)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder and those inside of it, in order."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _once(tokens: Tokens) -> Tokens:
    """Without the special tokens around the texts that the texts have at their beginning or end themselves."""
    inside = np.flatnonzero(tokens.sequence >= 0)
    if not inside.size:
        return tokens
    first, after = int(inside[0]), int(inside[-1]) + 1
    before, texts, behind = np.split(tokens.ids, [first, after])
    kept = np.ones(tokens.ids.size, bool)
    kept[first - _overlap(before, texts) : first] = False
    kept[after : after + _overlap(texts, behind)] = False
    return tokens.chosen(kept)


def _overlap(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """The largest number of ids with which `left` ends and `right` begins."""
    longest = min(left.size, right.size)
    return next((n for n in range(longest, 0, -1) if np.array_equal(left[left.size - n :], right[:n])), 0)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start]!r} at position {error.start}, which is not a character but a byte "
            "that was not UTF-8, or half of a surrogate pair: decode the text with its own encoding"
        ) from None


def _reason(error: BaseException) -> str:
    """What an error of the package says; others than its own, such as Ctrl-C, are raised on."""
    # A panic of Rust code is a BaseException.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return str(error)[:200]
