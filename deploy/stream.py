"""`Stream`: the new tokens of a prompt as they are written, and `Generation`, the whole of them."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .engine import FinishReason, PromptRead, TokenWritten
from .sampling import TokenLogprobs
from .text_stream import TextStream

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Generation:
    """What the model wrote.

    Attributes:
        text: the new tokens as text, without special tokens, up to a stop string; None for a model without a tokenizer.
        ids: int32, the new tokens only, including an end-of-sequence token and those of a stop string.
        finish_reason: "stop" after an end-of-sequence token or a stop string, "length" after max_new_tokens, "capacity"
            when the largest bucket was full.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: how many of them an earlier prompt, or a file, had left in the cache.
        logprobs: of each new token, if they were asked for; else None.
        proposed_tokens: how many guesses of new tokens were checked.
        guessed_tokens: how many of the new tokens such a guess had foretold.
    """

    text: str | None
    ids: NDArray[np.int32]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    proposed_tokens: int = 0
    guessed_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """One new token of a stream.

    Attributes:
        id: the token.
        text: the text that is certain now, "" while a character is incomplete or a stop string may have begun; None for
            a model without a tokenizer. The texts of all pieces together are the text of the `Generation`.
        logprobs: of the token, if they were asked for; else None.
        guessed: whether the token was guessed, and came with others in one call.
    """

    id: int
    text: str | None
    logprobs: TokenLogprobs | None = None
    guessed: bool = False


class Stream(Iterator[Piece]):
    """The new tokens of a prompt, each as soon as it is written; for `for` and `async for`.

    Between two tokens the session may do other things. `close`, the end of a `with` block, or dropping the stream ends
    the request early.

    Args:
        follow: gives the next token, and tells the callback of what is read of the prompt before it.
        end: ends the request, from any thread.
        prompt_tokens: length of the prompt.
        text: of the new tokens; None for a model without a tokenizer.
        progress: called after each chunk with the number of prompt tokens done and the total.

    Attributes:
        generation: the complete result after the last token; None before.
    """

    def __init__(
        self,
        follow: Callable[[Callable[[PromptRead], None]], TokenWritten],
        end: Callable[[], None],
        prompt_tokens: int,
        text: TextStream | None,
        progress: Progress | None,
    ) -> None:
        self._follow, self._end, self._progress = follow, end, progress
        self._prompt_tokens, self._cached_tokens, self._proposed_tokens = prompt_tokens, 0, 0
        self._text = text
        self._ended = False
        self._pieces: list[Piece] = []
        self.generation: Generation | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        try:
            written = self._follow(self._read)
            piece, reason = self._piece(written)
        except BaseException:
            self.close()
            raise
        self._pieces.append(piece)
        if reason is not None:
            self.close()
            self.generation = self._whole(reason)
        return piece

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        piece = await asyncio.to_thread(next, self, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def wait(self) -> Generation:
        """Writes the remaining tokens and returns the complete result."""
        for _ in self:
            pass
        if self.generation is None:
            raise RuntimeError("the stream was closed before its end: the text is incomplete")
        return self.generation

    def close(self) -> None:
        """Ends the request, if it has not ended."""
        if not self._ended:
            self._ended = True
            self._end()

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, event: PromptRead) -> None:
        self._cached_tokens = event.restored
        if self._progress:
            self._progress(event.done, event.total)

    def _piece(self, written: TokenWritten) -> tuple[Piece, FinishReason | None]:
        """The token as a piece, and why it is the last, if it is."""
        reason = written.finish_reason
        self._proposed_tokens += written.proposed
        if self._text is None:
            return Piece(written.id, None, written.logprobs, written.guessed), reason
        text = self._text.push(written.id)
        if reason is not None:
            text += self._text.finish()
        if self._text.stopped is not None:
            reason = "stop"
        return Piece(written.id, text, written.logprobs, written.guessed), reason

    def _whole(self, reason: FinishReason) -> Generation:
        texts = [piece.text for piece in self._pieces if piece.text is not None]
        logprobs = tuple(piece.logprobs for piece in self._pieces if piece.logprobs is not None)
        return Generation(
            None if self._text is None else "".join(texts),
            np.array([piece.id for piece in self._pieces], np.int32),
            reason,
            self._prompt_tokens,
            self._cached_tokens,
            logprobs or None,
            self._proposed_tokens,
            sum(piece.guessed for piece in self._pieces),
        )
