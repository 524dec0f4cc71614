"""The texts of an evaluation, cut into windows of token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.tokenization import TextTokenizer
from ..host import strict_json
from ..host.text import decode


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


def read_ids(file: Path, tokenizer: TextTokenizer | None, vocab_size: int) -> Text:
    """A text as token ids: .npy and .json files hold ids, others are UTF-8 for the tokenizer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no text and no ids, or a text for a model without tokenizer.
    """
    data = file.read_bytes()
    if file.suffix == ".npy":
        ids: Any = np.load(file, allow_pickle=False)
    elif file.suffix == ".json":
        ids = np.asarray(strict_json.parse(data, str(file)))
    elif tokenizer is None:
        raise ValueError(f"the checkpoint has no tokenizer for {file}: give token ids as .npy or .json")
    else:
        ids = tokenizer.encode(decode(data, str(file)), add_special_tokens=False).ids
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise ValueError(f"{file} has shape {ids.shape} and dtype {ids.dtype}, expected a 1-D array of token ids")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{file} has ids {ids.min()}..{ids.max()}, expected ids from 0 to {vocab_size - 1}")
    return Text(file.name, hashlib.sha256(data).hexdigest(), ids.astype(np.int32))


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
