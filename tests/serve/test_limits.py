"""Limits and settings: keys, bodies, queues, times, prompts that are cut, other origins."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import iceformer
from iceformer.deploy.session import Session
from iceformer.serve.settings import Settings

from .conftest import CONTEXT, MESSAGES, NO_END, PROMPT, Served, events_of, held_calls, serving, slow_calls

COMPLETION = "/v1/completions"


@pytest.fixture(scope="module")
def strict(artifact: Path) -> Iterator[Served]:
    """A server with a key, small limits, prompts that are cut, and an origin."""
    with serving(
        {"fox": artifact, "other": artifact},
        api_key="secret",
        overflow="truncate-oldest",
        queue=2,
        body_timeout=0.2,
        max_body=5000,
        max_tokens=50,
        max_choices=4,
        cors_origins=("https://example.org",),
    ) as running:
        yield running


HEADERS = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health/ready", "/metrics", "/openapi.json", "/nothing", "/docs", "/v1/chat/completions"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": ""},
    ],
)
def test_every_route_needs_the_key(strict: Served, path: str, headers: dict[str, str]) -> None:
    for response in (strict.get(path, headers=headers), strict.post(path, json={}, headers=headers)):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in response.text


def test_liveness_needs_no_key(strict: Served) -> None:
    assert strict.get("/health/live").json() == {"status": "ok"}


def test_the_key_opens_all_routes(strict: Served) -> None:
    assert strict.client(api_key="secret").models.list().data
    assert strict.get("/metrics", headers={"X-Api-Key": "secret"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        strict.client(api_key="wrong").models.list()


def test_a_model_has_to_be_named_where_there_are_several(strict: Served) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 2}
    response = strict.post(COMPLETION, json=asked, headers=HEADERS)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    for name in ("fox", "other"):
        answer = strict.post(COMPLETION, json={**asked, "model": name}, headers=HEADERS).json()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (name, 2)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(strict: Served, chunked: bool) -> None:
    body = json.dumps({"model": "fox", "prompt": "a" * 6000}).encode()
    content: Any = iter([body[:3000], body[3000:]]) if chunked else body
    response = strict.post(COMPLETION, content=content, headers=HEADERS)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "5000 bytes" in response.json()["error"]["message"]


def test_a_body_that_does_not_come(strict: Served) -> None:
    host, port = strict.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: fox\r\nAuthorization: Bearer secret\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + b'{"prompt"')
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_more_tokens_or_texts_than_allowed(strict: Served) -> None:
    for fields, param in (({"max_tokens": 51}, "max_tokens"), ({"n": 5}, "n"), ({"prompt": ["a"] * 5}, "n")):
        response = strict.post(COMPLETION, json={"model": "fox", "prompt": PROMPT, **fields}, headers=HEADERS)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_without_a_number_the_limit_holds(strict: Served) -> None:
    client = strict.client(api_key="secret")
    answer = client.chat.completions.create(model="fox", messages=MESSAGES, logit_bias=NO_END)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50


def test_a_full_queue(strict: Served) -> None:
    worker = strict.worker
    body = {"model": "fox", "prompt": PROMPT, "max_tokens": 1}
    with ThreadPoolExecutor(3) as pool, held_calls(strict) as go:

        def ask(**fields: str) -> Future[httpx2.Response]:
            return pool.submit(strict.post, COMPLETION, json=body | fields, headers=HEADERS)

        answers = [ask(), ask()]
        strict.until(lambda: worker.queued == 2)
        response = strict.post(COMPLETION, json=body, headers=HEADERS)
        answers.append(ask(user="another, of whom nothing waits"))
        strict.until(lambda: worker.queued == 3)
        go.set()
    assert [answer.result().status_code for answer in answers] == [200] * 3
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full"
    assert strict.post(COMPLETION, json=body, headers=HEADERS).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(artifact: Path, stream: bool) -> None:
    with serving({"fox": artifact}, timeout=0.3) as served, slow_calls(served, 0.02):
        body = {"prompt": PROMPT, "max_tokens": 200, "logit_bias": NO_END, "stream": stream}
        response = served.post(COMPLETION, json=body)
        served.until(lambda: served.worker.running == 0, 1.0)
    if stream:
        *_, last = (json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {"))
    else:
        assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
        last = response.json()
    assert last["error"]["code"] == "timeout"


def test_requests_that_are_not_done_when_the_server_stops(artifact: Path) -> None:
    def ask(stream: bool) -> httpx2.Response:
        body = {"prompt": PROMPT, "max_tokens": 200, "logit_bias": NO_END, "stream": stream}
        return httpx2.post(f"{served.url}{COMPLETION}", json=body, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        with ExitStack() as stack, serving({"fox": artifact}, drain=1.0) as served:
            stack.enter_context(slow_calls(served, 0.1))
            answers = [pool.submit(ask, stream) for stream in (False, True)]
            served.until(lambda: served.worker.running == 2)
        whole, streamed = (answer.result() for answer in answers)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutdown")
    *_, last = [event for event in events_of(streamed) if event != "done"]
    assert last["error"]["code"] == "shutdown"


def test_the_oldest_messages_are_dropped(strict: Served, session: Session) -> None:
    system = {"role": "system", "content": "You count stars."}
    turns = [
        {"role": role, "content": f"{number} {'the small fox ' * 8}"}
        for number in range(4)
        for role in ("user", "assistant")
    ]
    last = {"role": "user", "content": "and at night?"}
    messages = [system, *turns, last]
    answer = strict.post(
        "/v1/chat/completions",
        json={"model": "fox", "messages": messages, "max_tokens": 20, "logit_bias": NO_END},
        headers=HEADERS,
    ).json()
    whole = len(session.tokenize(session.chat_prompt(messages), add_special_tokens=False))
    (cut,) = answer["truncated"]
    kept = [system, *turns[cut["dropped_messages"] :], last]
    expected = session.chat(kept, 20, logit_bias={2: -100.0, 3: -100.0})
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert cut == {
        "prompt": 0,
        "dropped_tokens": whole - expected.prompt_tokens,
        "dropped_messages": cut["dropped_messages"],
    }
    assert cut["dropped_messages"] % 2 == 0
    assert CONTEXT - 20 - 80 < expected.prompt_tokens <= CONTEXT - 20


def test_a_last_message_that_does_not_fit_is_refused(strict: Served) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "the small fox " * 100}]
    response = strict.post("/v1/chat/completions", json={"model": "fox", "messages": messages}, headers=HEADERS)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_the_oldest_tokens_are_dropped_but_the_first_special_one(
    strict: Served, session: Session, stream: bool
) -> None:
    text = "the small fox counts the stars " * 40
    ids = session.tokenize(text).tolist()
    assert len(ids) > CONTEXT
    body = {"model": "fox", "prompt": text, "max_tokens": 10, "logit_bias": NO_END, "stream": stream}
    response = strict.post(COMPLETION, json=body, headers=HEADERS)
    expected = session.generate([1, *ids[-(CONTEXT - 11) :]], 10, logit_bias={2: -100.0, 3: -100.0})
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        found, last = "".join(chunk["choices"][0]["text"] for chunk in chunks), chunks[-1]
    else:
        last = response.json()
        found = last["choices"][0]["text"]
    assert found == expected.text
    assert last["truncated"] == [{"prompt": 0, "dropped_tokens": len(ids) - (CONTEXT - 10)}]


def test_other_origins(strict: Served, served: Served) -> None:
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = strict.http.options(f"{strict.url}{COMPLETION}", headers=asked)
    assert preflight.headers["access-control-allow-origin"] == "https://example.org"
    other = strict.http.options(f"{strict.url}{COMPLETION}", headers={**asked, "Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers
    answer = served.get("/v1/models", headers=asked)
    assert "access-control-allow-origin" not in answer.headers


def test_a_line_of_the_log_has_figures_and_no_text(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "iceformer.requests"):
        answer = served.post(COMPLETION, json={"prompt": PROMPT, "max_tokens": 3, "logit_bias": NO_END})
        served.get("/health/live")
        served.until(lambda: bool(caplog.records))
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "iceformer.requests"]
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["route"], line["status"], line["model"]) == (COMPLETION, 200, "fox")
    assert (line["completion_tokens"], line["finish"]) == (3, "length")
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert "fox who" not in json.dumps(line)
    assert answer.json()["choices"][0]["text"] not in json.dumps(line)


def test_metrics_count(served: Served) -> None:
    names = {
        "tokens": 'iceformer_generated_tokens_total{model="fox"}',
        "requests": f'iceformer_requests_total{{model="fox",route="{COMPLETION}",status="200"}}',
        "firsts": 'iceformer_time_to_first_token_seconds_count{model="fox"}',
    }
    before = {name: served.metric(line) for name, line in names.items()}
    with served.http.stream(
        "POST", f"{served.url}{COMPLETION}", json={"prompt": "b", "max_tokens": 4, "logit_bias": NO_END, "stream": True}
    ) as response:
        assert list(events_of(response))[-1] == "done"
    served.until(lambda: served.metric(names["requests"]) == before["requests"] + 1)
    assert served.metric(names["tokens"]) == before["tokens"] + 4
    assert served.metric(names["firsts"]) == before["firsts"] + 1
    assert served.metric('iceformer_ready{model="fox"}') == 1


def test_readiness_waits_for_the_artifact(artifact: Path) -> None:
    go = threading.Event()

    def load(path: Path) -> Session:
        assert go.wait(60)
        return iceformer.load(path)

    with serving({"fox": artifact}, load=load, wait=False) as served:
        assert served.get("/health/live").status_code == 200
        response = served.get("/health/ready")
        assert (response.status_code, response.json()["models"]) == (503, {"fox": "loading"})
        asked = served.post(COMPLETION, json={"prompt": PROMPT})
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "model_loading")
        assert int(asked.headers["retry-after"]) >= 1
        assert served.get("/v1/models").json()["data"][0]["ready"] is False
        go.set()
        served.until(lambda: served.get("/health/ready").status_code == 200)
        assert served.post(COMPLETION, json={"prompt": PROMPT, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue": 0},
        {"max_stall": 0.0},
        {"timeout": 0.0},
        {"drain": -1.0},
        {"ping": float("nan")},
        {"api_key": " "},
        {"max_tokens": 0},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("api_key", "API key")):
        Settings(**wrong)
