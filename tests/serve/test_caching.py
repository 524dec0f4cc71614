"""What was read of a prompt, saved by one server and restored by another."""

from pathlib import Path
from typing import Any

import pytest

from iceformer.deploy.session import Session

from .conftest import CHUNK, MESSAGES, NO_END, Served, serving

COMPLETION = "/v1/completions"
PROMPT = "the wood and the stars at night, " * 7


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_survives_its_server(artifact: Path, tmp_path: Path, session: Session) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 6, "logit_bias": NO_END}
    tokens = len(session.tokenize(PROMPT))
    with serving({"fox": artifact}, cache_dir=tmp_path) as served:
        nothing = served.post("/cache/save", json={"name": "tale", "prompt": PROMPT})
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "not_cached")
        first = served.post(COMPLETION, json=asked).json()
        saved = served.post("/cache/save", json={"name": "tale", "prompt": PROMPT}).json()
        assert saved["total"] == tokens
        assert tokens - CHUNK <= saved["tokens"] < tokens
        again = served.post("/cache/save", json={"name": "tale", "prompt": PROMPT})
        assert again.status_code == 409
    with serving({"fox": artifact}, cache_dir=tmp_path) as served:
        assert served.post("/cache/restore", json={"name": "tale"}).json() == {
            "name": "tale",
            "tokens": saved["tokens"],
        }
        second = served.post(COMPLETION, json=asked).json()
        assert second["choices"] == first["choices"]
        assert (cached(first), cached(second)) == (0, saved["tokens"])
        assert served.post("/cache/restore", json={"name": "other"}).status_code == 404
        (tmp_path / "tale" / "prefix.json").write_text("{}")
        assert served.post("/cache/restore", json={"name": "tale"}).status_code == 409


@pytest.mark.parametrize("name", ["", "../fox", ".hidden", "a/b", "a" * 101, "a\n"])
def test_names_that_are_no_names(served: Served, name: str) -> None:
    for route, more in (("save", {"messages": MESSAGES}), ("restore", {})):
        response = served.post(f"/cache/{route}", json={"name": name, **more})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


def test_a_server_without_a_folder_saves_nothing(served: Served) -> None:
    response = served.post("/cache/save", json={"name": "tale", "prompt": PROMPT})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_cache_dir")
