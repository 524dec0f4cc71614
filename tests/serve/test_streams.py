"""Long prompts: what a client hears while one is read, and what is left of it when the client leaves."""

import socket
from typing import Any

import httpx2

from iceformer.deploy.session import Session

from .conftest import CHUNK, NO_END, PROMPT, SLOTS, Served, events_of, held_calls, slow_calls

COMPLETION = "/v1/completions"
RUNNING = 'iceformer_running_texts{model="fox"}'


def long_prompt(session: Session, seed: str) -> list[int]:
    """Two hundred tokens that no other test has, in seven calls."""
    return (session.tokenize(seed).tolist() * 200)[:200]


def stream(served: Served, **fields: Any) -> Any:
    body = {"logit_bias": NO_END, "stream": True, **fields}
    return served.http.stream("POST", f"{served.url}{COMPLETION}", json=body)


def test_headers_and_pings_come_before_the_prompt_is_read(served: Served) -> None:
    with held_calls(served) as go, stream(served, prompt=PROMPT, max_tokens=2) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
        assert [next(events) for _ in range(3)] == ["ping"] * 3
        go.set()
        rest = [event for event in events if event != "ping"]
    assert rest[-1] == "done"
    assert rest[-2]["choices"][0]["finish_reason"] == "length"


def test_progress(served: Served, session: Session) -> None:
    ids = long_prompt(session, "progress of reading")
    for cached in (0, 5 * CHUNK):
        with stream(served, prompt=ids, max_tokens=1, return_progress=True) as response:
            events = [event for event in events_of(response) if event not in ("ping", "done")]
        told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert {each["total"] for each in told} == {200}
        assert (told[0]["processed"], told[0]["cache"], told[0]["time_ms"]) == (0, 0, 0)
        assert told[-1]["processed"] == 200
        assert told[-1]["cache"] >= cached
        done = [each["processed"] for each in told]
        assert done == sorted(set(done))
        if not cached:
            assert done[:6] == [0, 32, 64, 96, 128, 160]
        assert events[-1]["timings"]["cache_n"] == told[-1]["cache"]
        assert "prompt_progress" not in events[-1]


def test_a_client_that_leaves_frees_its_slot_within_a_second(served: Served, session: Session) -> None:
    """Two clients that would take ten seconds have all slots; a third waits for one."""
    ids = session.tokenize(PROMPT).tolist()
    with slow_calls(served, 0.05):
        streams = [stream(served, prompt=ids, max_tokens=200) for _ in range(SLOTS)]
        heard = [events_of(each.__enter__()) for each in streams]
        assert all(next(events) for events in heard)
        served.until(lambda: served.metric(RUNNING) == SLOTS)
        streams[0].__exit__(None, None, None)
        assert served.until(lambda: served.metric(RUNNING) == SLOTS - 1, 1.0) < 1.0
        answer = served.post(COMPLETION, json={"prompt": ids, "max_tokens": 2})
        assert answer.status_code == 200
        streams[1].__exit__(None, None, None)
    served.until(lambda: served.metric(RUNNING) == 0, 1.0)


def test_a_client_that_leaves_without_streaming_frees_its_slot_too(served: Served, session: Session) -> None:
    body = httpx2.Request("POST", served.url, json={"prompt": "a fox", "max_tokens": 200, "logit_bias": NO_END}).content
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: fox\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = served.url.removeprefix("http://").split(":")
    with slow_calls(served, 0.05):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            served.until(lambda: served.metric(RUNNING) == 1)
        assert served.until(lambda: served.metric(RUNNING) == 0, 1.0) < 1.0


def test_what_was_read_for_a_client_that_left_is_not_read_again(served: Served, session: Session) -> None:
    ids = long_prompt(session, "a client that leaves")
    with slow_calls(served, 0.05):
        with stream(served, prompt=ids, max_tokens=1, return_progress=True) as response:
            for event in events_of(response):
                if event != "ping" and event["prompt_progress"]["processed"] >= 2 * CHUNK:
                    break
        served.until(lambda: served.metric(RUNNING) == 0, 1.0)
    answer = served.post(COMPLETION, json={"prompt": ids, "max_tokens": 1}).json()
    assert 2 * CHUNK <= answer["usage"]["prompt_tokens_details"]["cached_tokens"] < 6 * CHUNK


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(served: Served) -> None:
    waiting = 'iceformer_waiting_prompts{model="fox"}'
    with held_calls(served) as go:
        streams = [stream(served, prompt=PROMPT, max_tokens=1) for _ in range(3)]
        for each in streams:
            assert each.__enter__().status_code == 200
        served.until(lambda: served.metric(waiting) == 3)
        for each in streams:
            each.__exit__(None, None, None)
        served.until(lambda: served.metric(waiting) == 0, 1.0)
        go.set()
    served.until(lambda: served.metric(RUNNING) == 0)


def test_a_client_that_does_not_read_holds_nobody_up(served: Served) -> None:
    body = httpx2.Request(
        "POST", served.url, json={"prompt": PROMPT, "max_tokens": 150, "logit_bias": NO_END, "stream": True}
    ).content
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: fox\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        connection.sendall(head + body)
        served.until(lambda: served.metric(RUNNING) == 1, 10)
        answer = served.post(COMPLETION, json={"prompt": "another", "max_tokens": 20, "logit_bias": NO_END})
        assert answer.json()["usage"]["completion_tokens"] == 20
        served.until(lambda: served.metric(RUNNING) == 0, 10)
