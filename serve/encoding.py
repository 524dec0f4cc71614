"""`/v1/embeddings` and `/rerank`: what encoders and cross-encoders give."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..deploy.inputs import check_ids, choose_prompt
from ..deploy.session import Encoding, Progress, Session
from .body import read
from .errors import CONTEXT_LENGTH, ApiError, refused
from .record import of
from .schemas import EmbeddingBody, Ids, RerankBody
from .service import Service


async def embed(service: Service, request: Request) -> Response:
    """Embeds texts, as a sentence embedder does."""
    body = await read(request, EmbeddingBody, service.settings)
    worker, session = service.worker(request, body.model, "encoder")
    text = session.info.model.text
    if text is None or not text.embedding:
        raise ApiError(400, f"the model {worker.name!r} is no sentence embedder: ask another", param="model")
    _check_count(len(body.inputs), service, "input")
    size = session.info.buckets[0].entries["encode"].results["pooled"].shape[-1]
    if body.dimensions is not None and not 1 <= body.dimensions <= size:
        raise ApiError(400, f"dimensions is {body.dimensions}, expected from 1 to {size}", param="dimensions")
    with refused("prompt_name"):
        prompt = choose_prompt(session.info, None, body.prompt_name)
    await asyncio.to_thread(_check_lengths, service, session, [(prompt, each) for each in body.inputs], "input")
    inputs: Any = [each if isinstance(each, str) else np.asarray(each) for each in body.inputs]

    def encode(session: Session, progress: Progress) -> list[Encoding]:
        return session.encode(
            inputs,
            prompt_name=body.prompt_name if any(isinstance(each, str) for each in inputs) else None,
            truncate_dim=body.dimensions,
            outputs=("pooled",),
            progress=progress,
        )

    with refused("input"):
        encodings = await service.run(request, worker, encode)
    tokens = _note(service, request, worker.name, encodings)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(encoding.pooled, body.encoding_format)}
        for index, encoding in enumerate(encodings)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": worker.name, "usage": used}
    return JSONResponse({**answer, **_truncated(encodings, "input")})


async def rerank(service: Service, request: Request) -> Response:
    """Ranks documents by a query, as a cross-encoder does."""
    body = await read(request, RerankBody, service.settings)
    worker, session = service.worker(request, body.model, "encoder")
    scores = session.info.buckets[0].entries["encode"].results.get("scores")
    if scores is None or scores.shape[1:] not in ((), (1,)):
        raise ApiError(400, f"the model {worker.name!r} is no cross-encoder with one score: ask another", param="model")
    _check_count(len(body.texts), service, "documents")
    pairs = [(body.query, text) for text in body.texts]
    with refused():
        front = choose_prompt(session.info, None, None)
    checked = [(front + query, text) for query, text in pairs]
    await asyncio.to_thread(_check_pairs, service, session, checked)

    def encode(session: Session, progress: Progress) -> list[Encoding]:
        return session.encode(pairs, outputs=("scores",), progress=progress)

    with refused("documents"):
        encodings = await service.run(request, worker, encode)
    tokens = _note(service, request, worker.name, encodings)
    values = [float(encoding.scores) for encoding in encodings if encoding.scores is not None]
    order = sorted(range(len(values)), key=lambda index: -values[index])[: body.top_n]
    results = [
        {
            "index": index,
            "relevance_score": values[index],
            **({"document": {"text": body.texts[index]}} if body.return_documents else {}),
        }
        for index in order
    ]
    answer = {"model": worker.name, "results": results, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return JSONResponse({**answer, **_truncated(encodings, "document")})


def _check_count(count: int, service: Service, param: str) -> None:
    most = service.settings.max_inputs
    if count > most:
        raise ApiError(400, f"{param} has {count} texts, and this server takes at most {most}: send fewer", param=param)


def _limit(session: Session) -> int:
    """Tokens that a text may have without being cut or refused."""
    text, context = session.info.model.text, session.info.buckets[-1].capacity
    return min(context, context if text is None or text.max_seq_length is None else text.max_seq_length)


def _check_lengths(service: Service, session: Session, inputs: Sequence[tuple[str, str | Ids]], param: str) -> None:
    """Refuses inputs that are too long; of texts, only where they are not to be cut."""
    context = session.info.buckets[-1].capacity
    for index, (front, each) in enumerate(inputs):
        if isinstance(each, str):
            with refused(param):
                tokens = session.count_tokens(front + each)
            if service.settings.overflow == "error":
                _check_tokens(tokens, _limit(session), param, index)
        else:
            _check_tokens(len(each), context, param, index)
            with refused(param):
                check_ids(each, f"{param} {index}", session.info)


def _check_pairs(service: Service, session: Session, pairs: Sequence[tuple[str, str]]) -> None:
    if service.settings.overflow != "error":
        return
    for index, pair in enumerate(pairs):
        with refused("documents"):
            tokens = session.count_tokens(*pair)
        _check_tokens(tokens, _limit(session), "documents", index)


def _check_tokens(tokens: int, limit: int, param: str, index: int) -> None:
    if tokens > limit:
        raise ApiError(
            400,
            f"{param} {index} has {tokens} tokens, but this model reads at most {limit}: shorten it, or start the "
            "server with --overflow truncate-oldest, which cuts it",
            code=CONTEXT_LENGTH,
            param=param,
            context_tokens=limit,
            prompt_tokens=tokens,
        )


def _truncated(encodings: Sequence[Encoding], name: str) -> dict[str, Any]:
    """Which texts were cut; nothing if none was."""
    cut = [{name: index} for index, encoding in enumerate(encodings) if encoding.truncated]
    return {"truncated": cut} if cut else {}


def _note(service: Service, request: Request, model: str, encodings: Sequence[Encoding]) -> int:
    """The tokens of all texts, which go into log and metrics too."""
    tokens = sum(encoding.tokens for encoding in encodings)
    of(request).figures |= {"texts": len(encodings), "prompt_tokens": tokens}
    service.metrics.note_encoded(model, tokens)
    return tokens


def _vector(pooled: NDArray[np.float32] | None, encoding_format: str | None) -> list[float] | str:
    """An embedding as numbers, or as base64 of its little-endian float32s."""
    assert pooled is not None
    if encoding_format == "base64":
        return base64.b64encode(pooled.astype("<f4").tobytes()).decode()
    return pooled.tolist()
