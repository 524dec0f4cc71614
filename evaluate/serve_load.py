"""`measure_serving`: a load of requests on an OpenAI-compatible server, and how long its clients wait.

The load is open: requests come when a Poisson process says so, however many are being answered, because users do not
wait for each other. The same seed gives the same prompts at the same times. Only the standard library is needed.
"""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_PERCENTILES = (50, 95, 99)
_WORDS = 2000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a server.

    Attributes:
        rate: requests a second, on average.
        requests: how many in all.
        words: of prompts; each request has one of these lengths, all equally likely.
        max_tokens: new tokens of each.
        seed: of times, lengths and words.
        timeout: seconds without a byte after which a request is given up.
        first_limit: seconds to the first token that a good answer may take.
        token_limit: seconds a token behind the first that a good answer may take, on average.

    Raises:
        ValueError: a number that makes no sense.
    """

    rate: float = 0.5
    requests: int = 40
    words: tuple[int, ...] = (50, 400, 2000)
    max_tokens: int = 32
    seed: int = 0
    timeout: float = 600.0
    first_limit: float = 10.0
    token_limit: float = 0.2

    def __post_init__(self) -> None:
        for name in ("rate", "timeout", "first_limit", "token_limit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name, values in (("requests", [self.requests]), ("words", self.words), ("max_tokens", [self.max_tokens])):
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Arrival:
    """A request of a load.

    Attributes:
        at: seconds after the beginning.
        words: of its prompt.
        prompt: text.
    """

    at: float
    words: int
    prompt: str


@dataclass(frozen=True)
class Answered:
    """What became of a request.

    Attributes:
        words: of its prompt.
        error: "" for an answer to its end; else the status and code, or why the connection failed.
        late: seconds by which it was sent too late.
        prompt_tokens, tokens: as the server counts them; tokens are counted by chunks of the stream where it does not.
        first: seconds to the first token; None without one.
        seconds: to the end.
        gaps: seconds between chunks of the text.
    """

    words: int
    error: str
    late: float
    prompt_tokens: int
    tokens: int
    first: float | None
    seconds: float
    gaps: tuple[float, ...]

    @property
    def per_token(self) -> float | None:
        """Seconds a token behind the first; None without."""
        return sum(self.gaps) / (self.tokens - 1) if self.tokens > 1 and self.gaps else None

    def good(self, load: Load) -> bool:
        """Whether it was answered within the limits."""
        if self.error or self.first is None or self.first > load.first_limit:
            return False
        return self.per_token is None or self.per_token <= load.token_limit


@dataclass(frozen=True)
class ServingResult:
    """How a server bore a load.

    Attributes:
        url: of the server.
        model: that was asked; None for its only one.
        load: what was asked of it.
        seconds: from the first request to the end of the last.
        answers: in the order of their requests.
    """

    url: str
    model: str | None
    load: Load
    seconds: float
    answers: tuple[Answered, ...]

    def summary(self) -> dict[str, Any]:
        """The figures; seconds are given as percentiles, of answers without errors."""
        fine = [each for each in self.answers if not each.error]
        good = sum(each.good(self.load) for each in self.answers)
        return {
            "requests": len(self.answers),
            "answered": len(fine),
            "errors": dict(sorted(Counter(each.error for each in self.answers if each.error).items())),
            "good": good,
            "goodput_per_second": good / self.seconds,
            "tokens_per_second": sum(each.tokens for each in fine) / self.seconds,
            "prompt_tokens_per_second": sum(each.prompt_tokens for each in fine) / self.seconds,
            "first_token_seconds": _percentiles([each.first for each in fine if each.first is not None]),
            "per_token_seconds": _percentiles([each.per_token for each in fine if each.per_token is not None]),
            "gap_seconds": _percentiles([gap for each in fine for gap in each.gaps]),
            "request_seconds": _percentiles([each.seconds for each in fine]),
            "latest_request_seconds": max(each.late for each in self.answers),
            "first_token_seconds_by_words": {
                str(words): _percentiles([x.first for x in fine if x.words == words and x.first is not None])
                for words in self.load.words
            },
        }

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "url": self.url,
            "model": self.model,
            "load": asdict(self.load),
            "seconds": self.seconds,
            "summary": self.summary(),
            "answers": [asdict(each) for each in self.answers],
        }


def arrivals(load: Load) -> list[Arrival]:
    """The requests of a load, which nothing but the load decides on."""
    rng = np.random.default_rng(load.seed)
    known = ["".join(rng.choice(list(_LETTERS), rng.integers(2, 9))) for _ in range(_WORDS)]
    times = np.cumsum(rng.exponential(1 / load.rate, load.requests))
    lengths = rng.choice(load.words, load.requests)
    return [
        Arrival(float(at - times[0]), int(words), " ".join(rng.choice(known, words)))
        for at, words in zip(times, lengths, strict=True)
    ]


def measure_serving(
    url: str, load: Load, *, model: str | None = None, api_key: str | None = None, done: Callable[[int], None]
) -> ServingResult:
    """Asks a server for completions, as streams.

    Args:
        url: of the server, with or without /v1.
        load: what is asked.
        model: the model's name; None leaves it out.
        api_key: the server's.
        done: told how many have ended, from any thread.

    Raises:
        ValueError: no URL of HTTP.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise ValueError(f"{url!r} is no server, expected a URL such as http://127.0.0.1:8000")
    planned, answers = arrivals(load), dict[int, Answered]()
    lock, start = threading.Lock(), time.perf_counter()

    def ask(number: int, arrival: Arrival) -> None:
        body: dict[str, Any] = {"prompt": arrival.prompt, "max_tokens": load.max_tokens, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}} | ({"model": model} if model else {})
        answer = _ask(base, body, arrival, load.timeout, api_key, start)
        with lock:
            answers[number] = answer
            done(len(answers))

    threads = []
    for number, arrival in enumerate(planned):
        time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        threads.append(threading.Thread(target=ask, args=(number, arrival), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return ServingResult(base, model, load, seconds, tuple(answers[number] for number in range(len(planned))))


def _ask(
    base: str, body: dict[str, Any], arrival: Arrival, timeout: float, api_key: str | None, start: float
) -> Answered:
    """Sends one request and reads its answer to the end."""
    parts = urlsplit(base)
    secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=timeout)
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    error = ""
    try:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
        connection.request("POST", f"{parts.path}/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            error = f"{response.status} {_code(response.read())}".strip()
        else:
            error = _read_stream(iter(response.readline, b""), times, usage)
    except (OSError, http.client.HTTPException, ValueError) as failure:
        error = type(failure).__name__
    finally:
        connection.close()
    end = time.perf_counter()
    return Answered(
        arrival.words,
        error,
        max(0.0, sent - start - arrival.at),
        int(usage.get("prompt_tokens", 0)),
        int(usage.get("completion_tokens", len(times))),
        times[0] - sent if times else None,
        end - sent,
        tuple(float(gap) for gap in np.diff(times)),
    )


def _read_stream(lines: Iterator[bytes], times: list[float], usage: dict[str, Any]) -> str:
    """Notes when text came; gives what ended the stream too early, or nothing."""
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return ""
        event = json.loads(data)
        if "error" in event:
            return str(event["error"].get("code") or event["error"].get("type") or "error")
        if any(choice.get("text") for choice in event.get("choices") or ()):
            times.append(time.perf_counter())
        usage.update(event.get("usage") or {})
    return "cut off"


def _code(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest; None of nothing."""
    if not values:
        return None
    found = {f"p{share}": float(np.percentile(values, share)) for share in _PERCENTILES}
    return {**found, "max": float(max(values))}
