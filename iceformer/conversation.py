"""Text of a model on the terminal as it is written, and a conversation with it."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from .host.interrupts import check as check_interrupt
from .host.interrupts import settle
from .host.messages import printable_lines
from .host.terminal import stderr, stdout

if TYPE_CHECKING:
    from .deploy.session import Session
    from .deploy.stream import Generation, Piece, Progress, Stream

CHAT_TOKENS = 512
"""New tokens of an answer at most, if nothing else is asked for."""
_PROMPT = "> "


@dataclass(frozen=True)
class Written:
    """A text that was written to its end, and how fast from its first token on; None for a text of one token."""

    generation: "Generation"
    tokens_per_second: float | None


def system_messages(text: str | None) -> list[dict[str, str]]:
    """A conversation's beginning."""
    return [] if text is None else [{"role": "system", "content": text}]


def write_out(stream: "Stream", first: "Piece", parts: list[str]) -> Written:
    """Writes a text to stdout as it comes, and ends the line.

    Args:
        stream: what is yet to come.
        first: the token that is there already.
        parts: takes what was written, piece by piece.
    """
    start = time.perf_counter()
    try:
        _echo(str(first.id) if first.text is None else first.text, parts)
        for piece in stream:
            check_interrupt()
            _echo(f" {piece.id}" if piece.text is None else piece.text, parts)
    finally:
        typer.echo()
    generation = stream.wait()
    seconds, more = time.perf_counter() - start, len(generation.ids) - 1
    return Written(generation, more / seconds if more and seconds else None)


def _echo(text: str, parts: list[str]) -> None:
    typer.echo(printable_lines(text) if stdout.is_terminal else text, nl=False)
    parts.append(text)


class Conversation:
    """Questions from stdin, answers to stdout.

    Args:
        session: of the model.
        system: its system message, or None.
        document: what stands before the first message, or None.
        options: of `Session.chat`.
        progress: shows how far a prompt is read.
    """

    def __init__(
        self,
        session: "Session",
        system: str | None,
        document: str | None,
        options: Mapping[str, Any],
        progress: Callable[[], "AbstractContextManager[Progress]"],
    ) -> None:
        self._session, self._options, self._progress = session, options, progress
        self._beginning, self._document = system_messages(system), document
        self._messages: list[dict[str, str]] = list(self._beginning)

    def run(self) -> None:
        """Goes on until /exit or the end of the input."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() a history and keys to edit with

        while (question := _read_line()) is not None:
            if question == "/exit":
                return
            if question == "/new":
                self._messages = list(self._beginning)
            elif question:
                self._answer(question)

    def _answer(self, question: str) -> None:
        """Answers, and takes question and answer into the conversation. What fails leaves it as it was."""
        first = len(self._messages) == len(self._beginning)
        content = f"{self._document}\n\n{question}" if first and self._document is not None else question
        asked = [*self._messages, {"role": "user", "content": content}]
        parts: list[str] = []
        try:
            self._write(asked, parts)
        except KeyboardInterrupt:
            settle()
            stderr.print("stopped", style="yellow")
        except ValueError as error:
            stderr.print(printable_lines(str(error)), style="red", soft_wrap=True)
            return
        if parts:
            self._messages = [*asked, {"role": "assistant", "content": "".join(parts)}]

    def _write(self, messages: list[dict[str, str]], parts: list[str]) -> None:
        with self._progress() as progress:
            stream = self._session.chat(messages, stream=True, progress=progress, **self._options)
            first = next(stream)
        with stream:
            write_out(stream, first, parts)


def _read_line() -> str | None:
    """The next question; None at the end of the input."""
    try:
        return input(_PROMPT if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
