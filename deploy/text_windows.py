"""Texts of token ids, and windows of them, as prompts by which a configuration is judged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tokenization import TextTokenizer


@dataclass(frozen=True, eq=False)
class Text:
    """A text as token ids, without special tokens.

    Attributes:
        name: of its file, without the folder.
        sha256: of the file.
        ids: int32 [n].
    """

    name: str
    sha256: str
    ids: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Window:
    """A run of a text's tokens, as one prompt.

    Attributes:
        text: the text's name.
        start: its first token in the text.
        ids: int32 [tokens], behind the special tokens that the tokenizer puts before a text.
    """

    text: str
    start: int
    ids: NDArray[np.int32]


def leading_tokens(tokenizer: TextTokenizer | None) -> NDArray[np.int32]:
    """The special tokens that a tokenizer puts before a text, such as <s>."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    tokens = tokenizer.encode("a", add_special_tokens=True)
    return tokens.ids[: int(np.argmax(tokens.sequence >= 0))]


def windows_of(texts: Sequence[Text], tokens: int, count: int, leading: NDArray[np.int32]) -> list[Window]:
    """`count` windows of `tokens` tokens, as many of each text: the middles of its equal parts, so that no window is a
    book's title pages or licence.

    Raises:
        ValueError: fewer windows than texts, or a text that is too short.
    """
    if count < len(texts):
        raise ValueError(f"windows is {count}, expected at least one for each of the {len(texts)} texts")
    windows = []
    for number, text in enumerate(texts):
        share = count // len(texts) + (number < count % len(texts))
        own = tokens - leading.size
        if text.ids.size < share * own:
            raise ValueError(
                f"{text.name} has {text.ids.size} tokens, expected at least {share * own} for its share of windows, "
                f"{share} of {tokens} tokens: ask for fewer tokens or windows, or give a longer text"
            )
        starts = (text.ids.size * (2 * np.arange(share) + 1) // share - own) // 2
        windows += [
            Window(text.name, int(start), np.concatenate([leading, text.ids[start : start + own]])) for start in starts
        ]
    return windows
