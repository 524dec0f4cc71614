"""What is refused, with which status, and that the server is as well as before."""

import json
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from .conftest import CONTEXT, MESSAGES, VOCABULARY, Served

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error object, of OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b'"text"',
        b'{"messages": [}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b"9" * 5000,
    ],
)
def test_what_is_no_json_object(served: Served, body: bytes) -> None:
    response = served.post(CHAT, content=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "no role"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": MESSAGES, "n": 0}, "n"),
        (CHAT, {"messages": MESSAGES, "n": 1.5}, "n"),
        (CHAT, {"messages": MESSAGES, "n": 1000}, "n"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        (CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream"),
        (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": MESSAGES, "return_progress": True}, "return_progress"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"the": 1}}, "logit_bias"),
        (CHAT, {"messages": MESSAGES, "stop": ["a"] * 100}, "stop"),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, None),
        (CHAT, {}, "messages"),
        (COMPLETION, {}, "prompt"),
        (COMPLETION, {"prompt": "", "add_special_tokens": False}, "prompt"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": [1, "two"]}, "prompt"),
        (COMPLETION, {"prompt": [VOCABULARY]}, "prompt"),
        (COMPLETION, {"prompt": [-1]}, "prompt"),
        (COMPLETION, {"prompt": [10**30]}, "prompt"),
        (COMPLETION, {"prompt": "a", "logprobs": True}, "logprobs"),
        (COMPLETION, {"prompt": "a", "logprobs": 21}, None),
        (COMPLETION, {"prompt": "a", "temperature": -1}, None),
        (COMPLETION, {"prompt": "a", "top_p": 0}, None),
        (COMPLETION, {"prompt": "a", "presence_penalty": 3}, None),
        (COMPLETION, {"prompt": "a", "stop": ""}, None),
        (COMPLETION, {"prompt": "a", "logit_bias": {str(VOCABULARY): 1}}, None),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "content": "b"}, None),
        ("/detokenize", {"tokens": [VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/rerank", {"query": "a", "documents": ["b"]}, "model"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
    ],
)
def test_wrong_fields(served: Served, path: str, fields: dict[str, Any], param: str | None) -> None:
    response = served.post(path, json=fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].partition(".")[0] == param


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "unsupported_parameter"),
        ({"frobnicate": 1}, "unknown_parameter"),
        ({"max_new_tokens": 3}, "unknown_parameter"),
    ],
)
def test_fields_that_would_change_the_answer(served: Served, fields: dict[str, Any], code: str) -> None:
    response = served.post(CHAT, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == (code, next(iter(fields)))


def test_fields_that_change_nothing(served: Served) -> None:
    neutral = {"user": "me", "store": False, "response_format": {"type": "text"}, "tools": [], "tool_choice": None}
    assert served.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, **neutral}).status_code == 200


def test_what_was_sent_is_not_repeated(served: Served) -> None:
    response = served.post(CHAT, json={"messages": {"role": "a secret"}, "temperature": "a secret"})
    assert response.status_code == 400
    assert "secret" not in response.text


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert "'gpt-4', expected one of: fox" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", CHAT, 405)])
def test_unknown_routes(served: Served, method: str, path: str, status: int) -> None:
    response = served.http.request(method, f"{served.url}{path}")
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (COMPLETION, "prompt")])
def test_a_prompt_that_is_too_long(served: Served, path: str, field: str) -> None:
    text = "the small fox " * 100
    given = [{"role": "user", "content": text}] if field == "messages" else text
    response = served.post(path, json={field: given})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    counted = served.post("/tokenize", json={"messages" if field == "messages" else "prompt": given}).json()["count"]
    assert counted > CONTEXT
    assert (error["context_tokens"], error["prompt_tokens"]) == (CONTEXT, counted)
    assert f"context is {CONTEXT} tokens, but the prompt has {counted} tokens" in error["message"]


def test_prompt_and_answer_together_are_too_long(client: OpenAI) -> None:
    ids = [10] * (CONTEXT - 4)
    answer = client.completions.create(model="fox", prompt=ids, max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == CONTEXT - 4
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fox", prompt=ids, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert f"{CONTEXT - 4} tokens and 5 new tokens were asked for, {CONTEXT + 1} together" in str(caught.value)


def test_a_failure_of_the_server_is_an_error_and_no_more(
    served: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by mistake")

    with monkeypatch.context() as patch:
        patch.setattr("iceformer.serve.writing.prepare", fail)
        response = served.post(CHAT, json={"messages": MESSAGES})
    assert response.status_code == 500
    assert "by mistake" not in response.text
    assert error_of(response)["code"] == "internal_error"
    assert "by mistake" in caplog.text
    assert client.completions.create(model="fox", prompt="a", max_tokens=1).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_call_of_the_engine_is_an_error_of_its_requests(served: Served, stream: bool) -> None:
    runner: Any = served.worker.session.engine._runner
    call = runner.call

    def fail(*_: Any) -> None:
        raise MemoryError

    body = {"prompt": "the stars at night", "max_tokens": 20, "stream": stream}
    runner.call = fail
    try:
        response = served.post(COMPLETION, json=body)
    finally:
        runner.call = call
    error = json.loads(response.text.split("data: ")[1])["error"] if stream else error_of(response)
    assert response.status_code == (200 if stream else 500)
    assert (error["type"], error["code"]) == ("server_error", "lost")
    assert served.post(COMPLETION, json=body).status_code == 200
