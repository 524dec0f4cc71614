"""Text to token ids and back, with the tokenizer.json of an artifact."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .manifest import ArtifactError

_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a text, or of a pair of texts.

    Attributes:
        ids: int32 [n].
        type_ids: int32 [n], the segment of each.
        offsets: int32 [n, 2], where in its text each begins and ends, in characters.
        sequence: int32 [n], which text of a pair each is of; -1 for special tokens that stand around the texts.
    """

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    sequence: NDArray[np.int32]

    def chosen(self, kept: NDArray[np.bool_]) -> "Tokens":
        """Some of the tokens."""
        return Tokens(self.ids[kept], self.type_ids[kept], self.offsets[kept], self.sequence[kept])


class TextTokenizer:
    """A tokenizer without truncation and padding.

    Raises:
        ArtifactError: tokenizer.json cannot be read.
    """

    def __init__(self, data: bytes, vocab_size: int | None) -> None:
        from tokenizers import Tokenizer

        self._vocab_size = vocab_size
        try:
            self._tokenizer = Tokenizer.from_str(data.decode())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except BaseException as error:
            raise ArtifactError(
                f"tokenizer.json cannot be read ({_reason(error)}): convert the source again, with one that "
                "the package tokenizers reads"
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
        )
        self._check_ids(tokens.ids)
        return _once(tokens) if add_special_tokens is None else tokens

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; ValueError if the tokenizer has none for them."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            raise ValueError(f"tokenizer.json cannot decode {str(ids)[:_SHOWN]} ({_reason(error)})") from error

    def _check_ids(self, ids: NDArray[np.int32]) -> None:
        limit = self._vocab_size
        if limit is not None and ids.size and ids.max() >= limit:
            beyond = int(ids.max())
            raise ValueError(
                f"tokenizer.json gives {self._tokenizer.id_to_token(beyond)!r} the id {beyond}, but the model has "
                f"{limit} ids: it is not the tokenizer of this model"
            )


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
            f"the text has {text[error.start]!r} at position {error.start}, which is no character but a byte that was "
            "not UTF-8, or half of a surrogate pair: decode it in its own encoding"
        ) from None


def _reason(error: BaseException) -> str:
    """What an error of the package says; others than its own, such as Ctrl-C, are raised on."""
    # A panic of Rust code is a BaseException.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return str(error)[:200]
