"""A load on servers that answer, refuse and break off."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from iceformer.evaluate.serve_load import Answered, Load, ServingResult, arrivals, measure_serving

FAST = Load(rate=200.0, requests=6, words=(3, 5), max_tokens=4)


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]) -> Iterator[str]:
    """A server that does with every request what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def stream(handler: BaseHTTPRequestHandler, *lines: str) -> None:
    handler.send_response(200)
    handler.end_headers()
    for line in lines:
        handler.wfile.write(f"data: {line}\n\n".encode())


TEXT = json.dumps({"choices": [{"text": "a"}]})
USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def test_answers_are_measured() -> None:
    bodies: list[dict[str, Any]] = []
    keys: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        bodies.append(body)
        keys.append(handler.headers["Authorization"])
        stream(handler, TEXT, TEXT, USAGE, "[DONE]")

    done: list[int] = []
    with server(answer) as url:
        result = measure_serving(f"{url}/v1", FAST, model="fox", api_key="secret", done=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert set(keys) == {"Bearer secret"}
    assert sorted(body["prompt"] for body in bodies) == sorted(each.prompt for each in arrivals(FAST))
    assert {(body["model"], body["max_tokens"], body["stream"]) for body in bodies} == {("fox", 4, True)}
    summary = json.loads(json.dumps(result.to_json()))["summary"]
    assert (summary["requests"], summary["answered"], summary["good"], summary["errors"]) == (6, 6, 6, {})
    assert all((each.tokens, each.prompt_tokens, len(each.gaps)) == (3, 7, 1) for each in result.answers)
    first = summary["first_token_seconds"]
    assert 0 < first["p50"] <= first["p95"] <= first["p99"] <= first["max"] <= result.seconds


@pytest.mark.parametrize(
    ("error", "lines"),
    [("timeout", (TEXT, json.dumps({"error": {"code": "timeout"}}))), ("cut off", (TEXT, TEXT))],
)
def test_streams_that_end_too_early_are_errors(error: str, lines: tuple[str, ...]) -> None:
    with server(lambda handler, body: stream(handler, *lines)) as url:
        summary = measure_serving(url, FAST, done=lambda _: None).summary()
    assert (summary["answered"], summary["good"], summary["errors"]) == (0, 0, {error: 6})
    assert summary["first_token_seconds"] is None


def test_refusals_are_counted_by_their_code() -> None:
    def refuse(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(429)
        handler.end_headers()
        handler.wfile.write(b'{"error": {"code": "queue_full"}}')

    with server(refuse) as url:
        assert measure_serving(url, FAST, done=lambda _: None).summary()["errors"] == {"429 queue_full": 6}
    assert measure_serving(url, FAST, done=lambda _: None).summary()["errors"] == {"ConnectionRefusedError": 6}


def test_the_seed_decides_on_times_lengths_and_words() -> None:
    planned = arrivals(Load(rate=2.0, requests=2000, words=(1, 9)))
    assert planned == arrivals(Load(rate=2.0, requests=2000, words=(1, 9)))
    assert planned != arrivals(Load(rate=2.0, requests=2000, words=(1, 9), seed=1))
    assert planned[0].at == 0
    assert 2000 / planned[-1].at == pytest.approx(2.0, rel=0.1)
    assert {len(each.prompt.split()) for each in planned} == {1, 9}


def test_goodput_counts_what_is_within_both_limits() -> None:
    def answered(first: float, gaps: tuple[float, ...], error: str = "") -> Answered:
        return Answered(3, error, 0.0, 3, 1 + len(gaps), first, 1.0, gaps)

    load = Load(first_limit=1.0, token_limit=0.1)
    answers = (
        answered(1.0, (0.1, 0.1)),
        answered(1.1, (0.1,)),
        answered(0.5, (0.1, 0.2)),
        answered(0.5, ()),
        answered(0.5, (), "cut off"),
    )
    summary = ServingResult("", None, load, 4.0, answers).summary()
    assert (summary["good"], summary["goodput_per_second"]) == (2, 0.5)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"requests": 0}, {"words": ()}, {"timeout": float("inf")}])
def test_loads_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Load(**wrong)


def test_what_is_no_url() -> None:
    with pytest.raises(ValueError, match="expected a URL"):
        measure_serving("localhost:8000", FAST, done=lambda _: None)
