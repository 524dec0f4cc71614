"""Embeddings and ranking: what the session encodes."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import iceformer
from iceformer.deploy.session import Session

from ..field.sentence_folders import convert, embedder
from ..field.test_cross_encoders import cross_encoder
from .conftest import Served, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEXTS = ["small foxes", "Small Foxes count the stars", "the stars at night"]
LONG = "the stars at night " * 20
LIMIT = 48


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An embedder and a cross-encoder, both of 48 tokens."""
    folder = tmp_path_factory.mktemp("encoders")
    sources = {
        "embedder": embedder(folder / "embedder", prompts={"ask": "query : "}),
        "ranker": cross_encoder(folder / "ranker", max_length=LIMIT),
    }
    options: dict[str, Any] = {"buckets": (64,), "batch": 2, "attention": iceformer.Exact()}
    return {
        name: iceformer.compile(convert(source), folder / f"artifact of {name}", **options)
        for name, source in sources.items()
    }


@pytest.fixture(scope="module")
def sessions(artifacts: dict[str, Path]) -> dict[str, Session]:
    return {name: iceformer.load(path) for name, path in artifacts.items()}


@pytest.fixture(scope="module")
def encoders(artifacts: dict[str, Path]) -> Iterator[Served]:
    with serving(artifacts) as running:
        yield running


def vectors_of(answer: Any) -> np.ndarray:
    return np.array([each.embedding for each in answer.data], np.float32)


@pytest.mark.parametrize("given", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings(encoders: Served, sessions: dict[str, Session], given: dict[str, Any]) -> None:
    """The client asks for base64 itself, and gives numbers, unless it is told a format."""
    expected = sessions["embedder"].encode(TEXTS)
    answer = encoders.client().embeddings.create(model="embedder", input=TEXTS, **given)
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(encoding.tokens for encoding in expected)
    if given.get("encoding_format") == "base64":
        found = [np.frombuffer(base64.b64decode(str(each.embedding)), "<f4") for each in answer.data]
    else:
        found = list(vectors_of(answer))
    for vector, encoding in zip(found, expected, strict=True):
        np.testing.assert_array_equal(vector, encoding.pooled)


def test_one_text_ids_and_dimensions(encoders: Served, sessions: dict[str, Session]) -> None:
    client, session = encoders.client(), sessions["embedder"]
    expected = session.encode(TEXTS[1], truncate_dim=5).pooled
    found = client.embeddings.create(model="embedder", input=TEXTS[1], dimensions=5)
    np.testing.assert_array_equal(vectors_of(found)[0], expected)
    ids = session.tokenize(TEXTS[1], add_special_tokens=True).tolist()
    for given in (ids, [ids]):
        (vector,) = vectors_of(client.embeddings.create(model="embedder", input=given))
        np.testing.assert_array_equal(vector, session.encode(TEXTS[1]).pooled)
    with pytest.raises(openai.BadRequestError, match="dimensions is 10000, expected from 1 to"):
        client.embeddings.create(model="embedder", input="a", dimensions=10_000)


def test_a_prompt_by_name(encoders: Served, sessions: dict[str, Session]) -> None:
    client = encoders.client()
    found = client.embeddings.create(model="embedder", input=TEXTS[0], extra_body={"prompt_name": "ask"})
    np.testing.assert_array_equal(vectors_of(found)[0], sessions["embedder"].encode(TEXTS[0], prompt_name="ask").pooled)
    with pytest.raises(openai.BadRequestError, match=r"the model's prompts are: .*ask"):
        client.embeddings.create(model="embedder", input="a", extra_body={"prompt_name": "other"})


def test_a_text_that_is_too_long(encoders: Served, sessions: dict[str, Session], artifacts: dict[str, Path]) -> None:
    tokens = sessions["embedder"].count_tokens(LONG)
    with pytest.raises(openai.BadRequestError) as caught:
        encoders.client().embeddings.create(model="embedder", input=[TEXTS[0], LONG])
    assert caught.value.code == "context_length_exceeded"
    assert f"input 1 has {tokens} tokens, but this model reads at most {LIMIT}" in str(caught.value)
    asked = {"model": "ranker", "query": "small", "documents": [LONG]}
    response = encoders.post("/rerank", json=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    with serving(artifacts, overflow="truncate-oldest") as served:
        answer: Any = served.client().embeddings.create(model="embedder", input=[TEXTS[0], LONG])
        assert served.post("/rerank", json=asked).json()["truncated"] == [{"document": 0}]
    assert answer.truncated == [{"input": 1}]
    np.testing.assert_array_equal(vectors_of(answer)[1], sessions["embedder"].encode(LONG).pooled)


def test_rerank(encoders: Served, sessions: dict[str, Session]) -> None:
    query = "count the stars"
    encodings = sessions["ranker"].encode([(query, text) for text in TEXTS])
    scores = [float(encoding.scores) for encoding in encodings if encoding.scores is not None]
    expected = sorted(range(3), key=lambda index: -scores[index])
    asked = {"model": "ranker", "query": query, "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    for path in ("/rerank", "/v1/rerank"):
        results = encoders.post(path, json={**asked, "return_documents": True}).json()["results"]
        assert [each["index"] for each in results] == expected
        assert [each["relevance_score"] for each in results] == [scores[index] for index in expected]
        assert [each["document"]["text"] for each in results] == [TEXTS[index] for index in expected]
    (best,) = encoders.post("/rerank", json={**asked, "top_n": 1}).json()["results"]
    assert best == {"index": expected[0], "relevance_score": scores[expected[0]]}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"model": "ranker", "input": "a"}),
        ("/rerank", {"model": "embedder", "query": "a", "documents": ["b"]}),
        ("/v1/chat/completions", {"model": "embedder", "messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_model_of_another_kind(encoders: Served, path: str, fields: dict[str, Any]) -> None:
    response = encoders.post(path, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_more_texts_than_allowed(encoders: Served) -> None:
    response = encoders.post("/v1/embeddings", json={"model": "embedder", "input": ["a"] * 2049})
    assert response.status_code == 400
    assert "at most 2048" in response.json()["error"]["message"]
