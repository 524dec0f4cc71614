"""`/tokenize`, `/detokenize`, `/apply-template` and `/v1/models`: what needs no computing."""

import asyncio

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..deploy.session import Session
from .body import read
from .errors import ApiError, refused
from .prompts import chat_text
from .record import of
from .schemas import DetokenizeBody, TemplateBody, TokenizeBody
from .service import Service
from .worker import Worker, find


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat template has it."""
    body = await read(request, TokenizeBody, service.settings)
    _, session = service.worker(request, body.model)
    tokens = await asyncio.to_thread(ids_of, session, body)
    context = session.info.buckets[-1].capacity
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context})


def ids_of(session: Session, body: TokenizeBody) -> list[int]:
    """The token ids of a text or of a conversation.

    Raises:
        ApiError: 400 for a request that has not one of them, or what cannot be tokenized.
    """
    given = [each for each in (body.prompt, body.content, body.messages) if each is not None]
    if len(given) != 1:
        raise ApiError(400, f"the request has {len(given)} of prompt, content and messages, expected one")
    text, special = given[0], body.add_special_tokens
    if not isinstance(text, str):
        text, special = chat_text(session, text, body.chat_template_kwargs), False
    with refused("prompt"):
        return session.tokenize(text, add_special_tokens=special).tolist()


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, without special tokens; vLLM calls it `prompt` and llama-server `content`."""
    body = await read(request, DetokenizeBody, service.settings)
    _, session = service.worker(request, body.model)
    vocabulary = session.info.model.vocab_size or 0
    wrong = next((id for id in body.tokens if not 0 <= id < vocabulary), None)
    if wrong is not None:
        raise ApiError(400, f"tokens has {wrong}, expected ids from 0 to {vocabulary - 1}", param="tokens")
    with refused("tokens"):
        text = await asyncio.to_thread(session.detokenize, np.asarray(body.tokens, np.int64))
    return JSONResponse({"prompt": text, "content": text})


async def apply_template(service: Service, request: Request) -> Response:
    """The prompt of a conversation, as the model reads it."""
    body = await read(request, TemplateBody, service.settings)
    _, session = service.worker(request, body.model, "decoder")
    return JSONResponse(
        {"prompt": await asyncio.to_thread(chat_text, session, body.messages, body.chat_template_kwargs)}
    )


async def models(service: Service, request: Request) -> Response:
    """All models, loaded or not."""
    return JSONResponse({"object": "list", "data": [_model(worker) for worker in service.workers.values()]})


async def model(service: Service, request: Request) -> Response:
    """One model."""
    worker = find(service.workers, request.path_params["name"])
    of(request).model = worker.name
    return JSONResponse(_model(worker))


def _model(worker: Worker) -> dict[str, object]:
    info = worker.session.info if worker.ready else None
    return {
        "id": worker.name,
        "object": "model",
        "created": worker.created,
        "owned_by": "iceformer",
        "ready": worker.ready,
        "kind": info.model.kind if info else None,
        "max_model_len": info.buckets[-1].capacity if info else None,
    }
