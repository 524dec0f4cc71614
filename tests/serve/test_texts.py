"""Routes that turn texts into tokens and back."""

import base64
import hashlib
import json
import re
from typing import Any

import pytest

from iceformer.deploy.session import Session

from .conftest import CONTEXT, MESSAGES, PROMPT, Served


@pytest.mark.parametrize("name", ["prompt", "content"])
def test_tokenize_and_back(served: Served, session: Session, name: str) -> None:
    answer = served.post("/tokenize", json={name: PROMPT}).json()
    expected = session.tokenize(PROMPT).tolist()
    assert answer == {"tokens": expected, "count": len(expected), "max_model_len": CONTEXT}
    text = served.post("/detokenize", json={"tokens": expected}).json()
    assert text == {"prompt": PROMPT, "content": PROMPT}
    bare = served.post("/tokenize", json={name: PROMPT, "add_special_tokens": False}).json()
    assert bare["tokens"] == expected[1:]


def test_the_description_of_all_routes(served: Served) -> None:
    """Every reference has a schema, and every route says what it does."""
    document = served.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert {"ChatBody", "CompletionBody", "StreamOptions"} <= set(references) <= set(schemas)
    assert "temperature" in schemas["ChatBody"]["properties"]
    assert all(route["description"] for path in document["paths"].values() for route in path.values())


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    response = served.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.findall(r"https?://|//\w", response.text)
    policy = response.headers["content-security-policy"]
    for element in ("script", "style"):
        (inline,) = re.findall(rf"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_no_tokens_are_no_text(served: Served) -> None:
    assert served.post("/detokenize", json={"tokens": []}).json()["content"] == ""


def test_the_template(served: Served, session: Session) -> None:
    prompt = served.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
    assert prompt == session.chat_prompt(MESSAGES) == "<s>user: count the stars\n<s>assistant: "
    tokens: Any = served.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert tokens == session.tokenize(prompt, add_special_tokens=False).tolist()
    usage = served.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(tokens)
