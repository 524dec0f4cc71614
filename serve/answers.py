"""OpenAI's shapes of what was written: chat or plain text, whole or in chunks."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..deploy.session import Session
from .generation import Delta, Generation, Progress, Text, Token, timings, usage

_LEAST = -9999.0


@dataclass(frozen=True)
class Shape(ABC):
    """What differs between chat and plain text.

    Attributes:
        session: knows what tokens stand for.
    """

    session: Session
    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk before the first token; None for none."""

    @abstractmethod
    def delta(self, delta: Delta) -> dict[str, Any]:
        """The choice of a chunk."""

    @abstractmethod
    def progress(self, index: int) -> dict[str, Any]:
        """The choice of a chunk that tells of the prompt."""

    @abstractmethod
    def whole(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        """The choice of a whole answer."""


@dataclass(frozen=True)
class ChatShape(Shape):
    """`chat.completion` and `chat.completion.chunk`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, {"role": "assistant", "content": ""})

    def delta(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.added} if delta.added or delta.finish_reason is None else {}
        return self._choice(delta.text, content, delta.tokens, delta.finish_reason)

    def progress(self, index: int) -> dict[str, Any]:
        return self._choice(index, {})

    def whole(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def _choice(
        self, index: int, delta: dict[str, Any], tokens: Sequence[Token] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return {"content": [self._token(token) for token in tokens], "refusal": None} if tokens else None

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._likely(id, logprob) for id, logprob in token.logprobs.top]
        return {**self._likely(token.id, token.logprobs.logprob), "top_logprobs": top}

    def _likely(self, id: int, logprob: float) -> dict[str, Any]:
        data = self.session.token_bytes(id)
        return {"token": _shown(data), "logprob": _finite(logprob), "bytes": list(data)}


@dataclass(frozen=True)
class TextShape(Shape):
    """`text_completion`, whole and in chunks."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    _offsets: dict[int, int] = field(default_factory=dict)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta.text, delta.added, delta.tokens, delta.finish_reason)

    def progress(self, index: int) -> dict[str, Any]:
        return self._choice(index, "")

    def whole(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        return self._choice(index, text, tokens, finish_reason)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        names, offsets = [self._name(token.id) for token in tokens], []
        for name in names:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(name)
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "top_logprobs": [
                {self._name(id): _finite(logprob) for id, logprob in token.logprobs.top} for token in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, id: int) -> str:
        return _shown(self.session.token_bytes(id))


@dataclass(frozen=True)
class Answer:
    """Makes the JSON of one request's answer.

    Attributes:
        generation: what is written.
        shape: chat or plain text.
        model: its name.
        fingerprint: of the artifact.
        n: texts of each prompt.
    """

    generation: Generation
    shape: Shape
    model: str
    fingerprint: str
    n: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answer when all of it is written; errors as `Generation.updates`."""
        texts: list[list[str]] = [[] for _ in self.generation.texts]
        tokens: list[list[Token]] = [[] for _ in self.generation.texts]
        async for update in self.generation.updates():
            if isinstance(update, Delta):
                texts[update.text].append(update.added)
                tokens[update.text] += update.tokens
        choices = [
            self.shape.whole(index, "".join(texts[index]), tokens[index], text.finish_reason)
            for index, text in enumerate(self.generation.texts)
        ]
        head = self._head(self.shape.whole_object, choices)
        return {**head, "usage": usage(self.generation, self.n), **self._remarks()}

    async def chunks(self, *, includes_usage: bool, progress: bool) -> AsyncIterator[dict[str, Any]]:
        """The answer as it is written; errors as `Generation.updates`."""
        none = {"usage": None} if includes_usage else {}

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return {**self._head(self.shape.chunk_object, [choice]), **none}

        for index, text in enumerate(self.generation.texts):
            opening = self.shape.opening(index)
            if opening is not None:
                yield chunk(opening)
            if progress:
                yield {**chunk(self.shape.progress(index)), **_progress(text.progress)}
        async for update in self.generation.updates():
            if isinstance(update, Delta):
                done = all(text.finish_reason is not None for text in self.generation.texts)
                yield {**chunk(self.shape.delta(update)), **(self._remarks() if done else {})}
            elif progress:
                yield {**chunk(self.shape.progress(update.text)), **_progress(update)}
        if includes_usage:
            yield {**self._head(self.shape.chunk_object, []), "usage": usage(self.generation, self.n)}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.shape.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _remarks(self) -> dict[str, Any]:
        """What is said besides OpenAI's fields: how long it took, and what was left out of the prompts."""
        cut = [_truncation(index, text) for index, text in enumerate(self.generation.texts[:: self.n])]
        left = [each for each in cut if each is not None]
        return {"timings": timings(self.generation), **({"truncated": left} if left else {})}


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "prompt_progress": {
            "total": progress.total,
            "cache": progress.cached,
            "processed": progress.done,
            "time_ms": round(progress.seconds * 1000),
        }
    }


def _truncation(index: int, text: Text) -> dict[str, int] | None:
    prompt = text.prompt
    if not prompt.dropped_tokens:
        return None
    messages = {"dropped_messages": prompt.dropped_messages} if prompt.dropped_messages else {}
    return {"prompt": index, "dropped_tokens": prompt.dropped_tokens, **messages}


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot come has this log-probability, as in vLLM."""
    return max(logprob, _LEAST)


def _shown(data: bytes) -> str:
    """A token as text; one that is a part of a character by its bytes, as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
