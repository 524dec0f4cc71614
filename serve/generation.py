"""One request's texts on their way: events of the engine come in, text that is certain goes out.

A streamed answer and a whole one are made of the same updates, so that they are the same.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..deploy.engine import Event, PromptRead, Request, RequestLost
from ..deploy.generation_options import Choices
from ..deploy.sampling import TokenLogprobs
from ..deploy.session import Session
from ..deploy.text_stream import TextStream
from .errors import SERVER, TIMEOUT, ApiError
from .prompts import Prompt
from .worker import Ticket, Worker

_SEEDS = 1 << 63


@dataclass(frozen=True)
class Token:
    """A new token and how likely it was, for a request that asked for log-probabilities."""

    id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Progress:
    """So much of a prompt is read.

    Attributes:
        text: the index of the text that it belongs to.
        total: tokens of the prompt.
        cached: how many an earlier prompt had left.
        done: how many are in the cache now, those among them.
        seconds: since the first was begun.
    """

    text: int
    total: int
    cached: int = 0
    done: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Delta:
    """More of a text.

    Attributes:
        text: the index of the text.
        added: what is certain now.
        tokens: the new ones, if their log-probabilities were asked for.
        finish_reason: "stop" or "length" where it has ended.
    """

    text: int
    added: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


Update = Progress | Delta


@dataclass(eq=False)
class Text:
    """One text that is being written.

    Attributes:
        prompt: that it continues.
        options: of the text.
        stream: makes text of tokens.
        progress: of its prompt.
        written: number of new tokens.
        first, last: when the first and the last of them were written, by `time.perf_counter`.
        finish_reason: why it has ended; None before.
    """

    prompt: Prompt
    options: Choices
    stream: TextStream
    progress: Progress
    written: int = 0
    first: float = 0.0
    last: float = 0.0
    finish_reason: str | None = None


@dataclass(eq=False)
class Generation:
    """The texts of one request: each prompt's, one after the other.

    Attributes:
        worker: that writes them.
        texts: in their order.
        timeout: seconds that it may take.
        client: who asked.
        submitted: when it was given to the worker.
    """

    worker: Worker
    texts: list[Text]
    timeout: float
    client: str
    submitted: float = 0.0
    _tickets: list[Ticket] = field(default_factory=list)
    _events: "asyncio.Queue[tuple[int, Event]]" = field(default_factory=asyncio.Queue)

    def submit(self) -> None:
        """Gives the texts to the worker.

        Raises:
            ApiError: 429 or 503, as `Worker.submit`.
        """
        loop = asyncio.get_running_loop()

        def deliver(index: int) -> Callable[[Event], None]:
            def put(event: Event) -> None:
                with suppress(RuntimeError):  # The loop is closed, and nobody listens.
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return put

        requests = [
            Request(
                each.prompt.ids,
                each.options.max_new_tokens,
                each.options.sampling,
                each.options.logprobs,
                client=self.client,
            )
            for each in self.texts
        ]
        self.submitted = time.perf_counter()
        self._tickets = self.worker.submit(requests, [deliver(index) for index in range(len(requests))])

    def cancel(self) -> None:
        """Ends what has not ended."""
        for ticket in self._tickets:
            self.worker.cancel(ticket)

    async def updates(self) -> AsyncIterator[Update]:
        """What happens, until all texts have ended.

        Raises:
            ApiError: 500 where a text cannot be continued, 504 after the time-out.
        """
        end = self.submitted + self.timeout
        while any(text.finish_reason is None for text in self.texts):
            try:
                async with asyncio.timeout(end - time.perf_counter()):
                    index, event = await self._events.get()
            except TimeoutError:
                raise ApiError(
                    504,
                    f"the answer was not complete after {self.timeout:g} s: ask for less, or start the server with a "
                    "larger --timeout",
                    kind=TIMEOUT,
                    code="timeout",
                    headers={"x-should-retry": "false"},
                ) from None
            if self.texts[index].finish_reason is None:
                update = self._update(index, event)
                if update is not None:
                    yield update

    def _update(self, index: int, event: Event) -> Update | None:
        text = self.texts[index]
        if isinstance(event, RequestLost):
            raise ApiError(500, f"the text cannot be continued, because {event.why}", kind=SERVER, code="lost")
        if isinstance(event, PromptRead):
            text.progress = Progress(index, event.total, event.restored, event.done, event.seconds)
            return text.progress
        text.first, text.last = text.first or event.time, event.time
        text.written += 1
        added = text.stream.push(event.id)
        reason = event.finish_reason
        if reason is not None:
            added += text.stream.finish()
        if text.stream.stopped is not None:
            reason = "stop"
            self.worker.cancel(self._tickets[index])
        text.finish_reason = "length" if reason == "capacity" else reason
        tokens = () if event.logprobs is None else (Token(event.id, event.logprobs),)
        if not added and not tokens and reason is None:
            return None
        return Delta(index, added, tokens, text.finish_reason)


def prepare(
    session: Session,
    worker: Worker,
    prompts: Sequence[Prompt],
    options: Sequence[Choices],
    n: int,
    timeout: float,
    client: str,
) -> Generation:
    """The texts of a client's request, `n` of each prompt, with a seed of its own for each of these."""
    texts = []
    for prompt, chosen in zip(prompts, options, strict=True):
        for number in range(n):
            sampling = replace(chosen.sampling, seed=(chosen.sampling.seed + number) % _SEEDS)
            own = replace(chosen, sampling=sampling)
            progress = Progress(len(texts), len(prompt.ids))
            texts.append(Text(prompt, own, session.text_stream(chosen.stop), progress))
    return Generation(worker, texts, timeout, client)


def usage(generation: Generation, n: int) -> dict[str, object]:
    """OpenAI's `usage`; a prompt counts once, however many texts continue it."""
    prompts = generation.texts[::n]
    read, written = (
        sum(len(text.prompt.ids) for text in prompts),
        sum(text.written for text in generation.texts),
    )
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(text.progress.cached for text in prompts)},
    }


def timings(generation: Generation) -> dict[str, float | int]:
    """How long it took, named as in llama-server; of several texts, the sums of theirs.

    `prompt_n` tokens were read in `prompt_ms` and `cache_n` had been read before. `predicted_n` tokens were written;
    the first of each text comes with its prompt, the others took `predicted_ms`.
    """
    texts = generation.texts
    cached = sum(text.progress.cached for text in texts)
    read = sum(text.progress.done for text in texts) - cached
    seconds = sum(text.progress.seconds for text in texts)
    later = sum(max(text.written - 1, 0) for text in texts)
    writing = sum(text.last - text.first for text in texts)
    first = min((text.first for text in texts if text.written), default=generation.submitted)
    return {
        "queue_ms": _ms(max(first - generation.submitted - texts[0].progress.seconds, 0.0)),
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": _ms(seconds),
        "prompt_per_second": round(read / seconds, 3) if seconds > 0 else 0.0,
        "predicted_n": sum(text.written for text in texts),
        "predicted_ms": _ms(writing),
        "predicted_per_second": round(later / writing, 3) if writing > 0 else 0.0,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
