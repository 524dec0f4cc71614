"""The ASGI application: routes, errors and middleware."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from . import caching, encoding, texts, writing
from .errors import CLIENT_GONE, SERVER, ApiError, ClientGoneError
from .middleware import LIVENESS, ApiKey, Observe, response
from .page import page
from .record import of
from .schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    RestoreBody,
    SaveBody,
    TemplateBody,
    TokenizeBody,
)
from .service import Service
from .worker import Worker

Handler = Callable[[Service, Request], Awaitable[Response]]

_POSTS: dict[str, tuple[Handler, type[Body]]] = {
    "/v1/chat/completions": (writing.chat, ChatBody),
    "/v1/completions": (writing.complete, CompletionBody),
    "/v1/embeddings": (encoding.embed, EmbeddingBody),
    "/v1/rerank": (encoding.rerank, RerankBody),
    "/rerank": (encoding.rerank, RerankBody),
    "/tokenize": (texts.tokenize, TokenizeBody),
    "/detokenize": (texts.detokenize, DetokenizeBody),
    "/apply-template": (texts.apply_template, TemplateBody),
    "/cache/save": (caching.save, SaveBody),
    "/cache/restore": (caching.restore, RestoreBody),
}
_GETS: dict[str, Handler] = {"/": page, "/v1/models": texts.models, "/v1/models/{name:path}": texts.model}
_REFERENCE = "#/components/schemas/{model}"


def create_app(service: Service, loaded: Callable[[Worker], None]) -> FastAPI:
    """The application of a server, which loads the artifacts when it starts and closes them when it stops.

    Args:
        service: artifacts, settings and metrics.
        loaded: called in a worker's thread when its artifact is loaded, or cannot be.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for worker in service.workers.values():
            worker.start(loaded)
        yield
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in service.workers.values()))

    app = FastAPI(
        title="iceformer",
        version=__version__,
        docs_url=None,  # It fetches scripts from elsewhere.
        redoc_url=None,
        lifespan=lifespan,
        middleware=_middleware(service),
    )
    for path, (handler, schema) in _POSTS.items():
        content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=schema.__name__)}}}
        extra = {"requestBody": {"required": True, "content": content}}
        app.add_api_route(path, _endpoint(service, handler), methods=["POST"], openapi_extra=extra)
    for path, handler in {**_GETS, LIVENESS: _live, "/health/ready": _ready, "/metrics": _metrics}.items():
        app.add_api_route(path, _endpoint(service, handler), methods=["GET"])
    _add_schemas(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    return app


def _add_schemas(app: FastAPI) -> None:
    """Adds the bodies of requests to what `/openapi.json` tells: the routes read them themselves."""
    wanted: list[tuple[type[Body], Literal["validation"]]] = [(schema, "validation") for _, schema in _POSTS.values()]
    _, definitions = models_json_schema(wanted, ref_template=_REFERENCE)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document["components"] = {"schemas": definitions["$defs"]}
        return document

    app.openapi = openapi


def _middleware(service: Service) -> list[Middleware]:
    """The outermost first."""
    settings = service.settings
    layers = [Middleware(Observe, metrics=service.metrics)]
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if settings.api_key is not None:
        layers.append(Middleware(ApiKey, key=settings.api_key))
    return layers


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(service, request)

    endpoint.__doc__ = handler.__doc__
    endpoint.__name__ = handler.__name__.lstrip("_")
    return endpoint


async def _live(service: Service, request: Request) -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "ok"})


async def _ready(service: Service, request: Request) -> Response:
    """Whether every artifact is loaded; 503 while one is not."""
    states = {name: "ready" if worker.ready else "loading" for name, worker in service.workers.items()}
    return JSONResponse(
        {"status": "ok" if service.ready else "loading", "models": states}, 200 if service.ready else 503
    )


async def _metrics(service: Service, request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _api_error(request: Request, error: Any) -> Response:
    of(request).error = error.code or error.kind
    return response(error)


async def _http_error(request: Request, error: Any) -> Response:
    known = {
        404: f"there is no {request.url.path[:80]!r}: see GET /openapi.json for what there is",
        405: f"{request.method} is not what {request.url.path[:80]!r} takes: see GET /openapi.json",
    }
    kind = {"kind": SERVER} if error.status_code >= 500 else {}
    message = known.get(error.status_code, str(error.detail))
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers, **kind))


async def _client_gone(request: Request, error: Any) -> Response:
    of(request).error = "client_gone"
    return Response(status_code=CLIENT_GONE)
