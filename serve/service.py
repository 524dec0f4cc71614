"""`Service`: what the routes share, and what they do for each request in the same way."""

import asyncio
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from ..deploy.session import Progress, Session
from .errors import TIMEOUT, ApiError, stopping
from .metrics import Metrics
from .record import of
from .settings import Settings
from .sse import until_gone
from .worker import Registry, Worker, find

Result = TypeVar("Result")


class _UnwantedError(Exception):
    """Nobody waits for a result any more."""


@dataclass(frozen=True)
class Service:
    """One server.

    Attributes:
        workers: by the names of their artifacts.
        settings: how clients are treated.
        metrics: figures of all requests.
    """

    workers: Registry
    settings: Settings
    metrics: Metrics

    @property
    def ready(self) -> bool:
        """Whether every artifact is loaded."""
        return all(worker.ready for worker in self.workers.values())

    def worker(self, request: Request, model: str | None, kind: str | None = None) -> tuple[Worker, Session]:
        """The worker of the model that a request names, and its session.

        Args:
            request: whose record learns the name.
            model: its name; None for the only one.
            kind: "decoder" or "encoder", if the route needs one.

        Raises:
            ApiError: 404, 400 or 503, as `find` and `Worker.session`; 400 for a model of another kind.
        """
        worker = find(self.workers, model)
        of(request).model = worker.name
        session = worker.session
        found = session.info.model.kind
        if kind is not None and found != kind:
            routes = {"decoder": "/v1/chat/completions or /v1/completions", "encoder": "/v1/embeddings or /rerank"}
            raise ApiError(
                400, f"the model {worker.name!r} is of kind {found}: ask it through {routes[found]}", param="model"
            )
        return worker, session

    async def run(self, request: Request, worker: Worker, function: Callable[[Session, Progress], Result]) -> Result:
        """The result of a function in the worker's thread, which ends at its next progress when nobody waits for it.

        Raises:
            ApiError: 429 or 503, as `Worker.run`; 504 after the time-out; 503 where the server stops.
            ClientGoneError: the client left.
        """
        unwanted = threading.Event()

        def progress(done: int, total: int) -> None:
            if unwanted.is_set():
                raise _UnwantedError

        future = worker.run(lambda session: function(session, progress))
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await until_gone(asyncio.wrap_future(future), request.receive)
        except asyncio.CancelledError:
            raise stopping() from None
        except TimeoutError:
            raise ApiError(
                504,
                f"the answer was not there after {self.settings.timeout:g} s: send fewer texts",
                kind=TIMEOUT,
                code="timeout",
                headers={"x-should-retry": "false"},
            ) from None
        finally:
            unwanted.set()


def fingerprint(session: Session) -> str:
    """OpenAI's `system_fingerprint`: it changes when the artifact does."""
    return f"fp_{hashlib.sha256(session.fingerprint.encode()).hexdigest()[:12]}"
