"""Text of token ids piece by piece: ids come in one at a time, text that later ids cannot change goes out.

What is held back is a character that is not whole, what `clean_up_tokenization_spaces` may still replace, and what may
become a stop string. Only the last few tokens are decoded again, so a text costs time in proportion to its length.
"""

import re
from collections.abc import Sequence
from typing import Any

from .tokenization import TextTokenizer

_SHOWN = 40
_INCOMPLETE = "\ufffd"
_BYTE_TOKENS = 4
"""Tokens of at least a byte each that hold every character of which bytes may be missing."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TOKEN_BY_TOKEN = {"Replace", "Metaspace", "WordPiece", "BPEDecoder", "CTC", "ByteFallback", "Strip"}
_JOINING = {"ByteLevel", "Fuse"}


class TextStream:
    """Turns token ids into text as they come.

    All that `push` and `finish` give, joined, is `tokenizer.decode` of all ids, up to the first stop string: the one
    that is complete first, and the longest of those that are complete at once.

    Args:
        tokenizer: of the ids.
        stop: strings at which the text ends; they do not belong to it.

    Attributes:
        stopped: the stop string that was met; None before.

    Raises:
        ValueError: a stop string that is empty or no str.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._decoding = _Decoding(tokenizer)
        self._cleaning = _Cleaning(tokenizer)
        self._stopping = _Stopping(stop)
        self._finished = False

    @property
    def stopped(self) -> str | None:
        return self._stopping.met

    def push(self, id: int) -> str:
        """The text that is certain now and was not before; "" after a stop string.

        Raises:
            ValueError: an id that the tokenizer cannot decode, or the stream is finished.
        """
        if self._finished:
            raise ValueError("the text is finished: make another TextStream for another text")
        if self.stopped is not None:
            return ""
        return self._stopping.push(self._cleaning.push(self._decoding.push(id)))

    def finish(self) -> str:
        """The rest of the text, after the last id; "" after a stop string, or if called again."""
        if self._finished:
            return ""
        self._finished = True
        if self.stopped is not None:
            return ""
        rest = self._cleaning.push(self._decoding.finish()) + self._cleaning.finish()
        return self._stopping.push(rest) + self._stopping.finish()


class _Decoding:
    """Ids to text, with the spaces that the decoder writes.

    `_window` holds the last ids; `_given` is how many characters of their text are out already. It begins with an id
    whose text is out: for most decoders, the first token of a text is a special case.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        steps = tokenizer.decoder_steps
        kinds = {step["type"] for step in steps}
        self._grows = _grows(steps)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._window: list[int] = []
        self._given = 0

    def push(self, id: int) -> str:
        token = self._tokenizer.token(id)
        if token is None or (self._byte_level and not token):
            return ""
        self._window.append(id)
        # Bytes in a row are characters together, or none of them is.
        if not self._grows or (self._byte_fallback and _BYTE.fullmatch(token)):
            return ""
        text = self._tokenizer.decode_as_is(self._window)
        held = int(self._byte_level and text.endswith(_INCOMPLETE))
        new = text[self._given : len(text) - held]
        self._given = max(self._given, len(text) - held)
        self._shorten(held)
        return new

    def finish(self) -> str:
        return self._tokenizer.decode_as_is(self._window)[self._given :]

    def _shorten(self, held: int) -> None:
        """Forgets ids on which the text of later ones does not depend."""
        for kept in (_BYTE_TOKENS,) if held else (1, 2):
            window = self._window[-kept:]
            # Where it is empty, what a decoder leaves out at the beginning of a text may be yet to come.
            if text := self._tokenizer.decode_as_is(window):
                self._window, self._given = window, len(text) - held
                return


class _Cleaning:
    """Text as `clean_up_tokenization_spaces` leaves it, in parts that end with a character that has no part in it."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._clean_up = tokenizer.clean_up
        self._characters = "".join(tokenizer.cleaned_characters)
        self._held: list[str] = []

    def push(self, text: str) -> str:
        certain = text.rstrip(self._characters) if self._characters else text
        held = text[len(certain) :]
        if not certain:
            self._held.append(held)
            return ""
        cleaned = self._clean_up("".join(self._held) + certain)
        self._held = [held]
        return cleaned

    def finish(self) -> str:
        return self._clean_up("".join(self._held))


class _Stopping:
    """Text up to the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = check_stop(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.met: str | None = None

    def push(self, text: str) -> str:
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.met = min(found)
            self._held = ""
            return text[: end - len(self.met)]
        kept = self._begun(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        return self._held

    def _begun(self, text: str) -> int:
        """The largest number of characters with which the text ends and a stop string begins."""
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        begins = (n for n in lengths if any(len(stop) > n and text.endswith(stop[:n]) for stop in self._stop))
        return next(begins, 0)


def _grows(steps: list[dict[str, Any]]) -> bool:
    """Whether a token only adds to the text of those before it, as far as the characters are whole."""
    kinds = [step["type"] for step in steps]
    joined = next((index for index, kind in enumerate(kinds) if kind in _JOINING), len(kinds))
    after = steps[joined + 1 :]
    return set(kinds[:joined]) <= _TOKEN_BY_TOKEN and all(
        step["type"] == "Fuse" or (step["type"] == "Strip" and step["stop"] == 0) for step in after
    )


def check_stop(stop: Any) -> tuple[str, ...]:
    """The stop strings that a caller gives; ValueError for one that is empty or no str."""
    if isinstance(stop, str):
        raise ValueError(f"stop is the str {stop[:_SHOWN]!r}, expected a list of them: put it in brackets")
    for text in stop:
        if not isinstance(text, str):
            raise ValueError(f"a stop string is of type {type(text).__name__}, expected a str")
        if not text:
            raise ValueError("a stop string is empty, which every text has at its start: leave it out")
    return tuple(stop)
