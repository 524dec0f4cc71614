"""`Record`: what is known of one request when it ends, for a line of the log and for the metrics. It holds no text."""

import json
import logging
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

LOG = logging.getLogger("iceformer.requests")
_STATE = "iceformer_record"


@dataclass(eq=False)
class Record:
    """One request.

    Attributes:
        method, route: of the request; the route is "other" for a path that there is not.
        id: given back to the client as `x-request-id`.
        started: by `time.perf_counter`.
        status: of the response; 499 where the client left before it.
        model: the artifact's name, once it is known.
        error: the code of an error, if there was one.
        figures: numbers of tokens and times.
    """

    method: str
    route: str = "other"
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    model: str | None = None
    error: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the request came in."""
        return time.perf_counter() - self.started

    def line(self) -> str:
        """The line of the log."""
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "model": self.model,
            "error": self.error,
            "total_ms": round(self.seconds * 1000, 1),
            **self.figures,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


def put(scope: Scope, record: Record) -> None:
    """Keeps the record with its request."""
    scope.setdefault("state", {})[_STATE] = record


def of(request: Request | Scope) -> Record:
    """The record of a request."""
    return request["state"][_STATE]


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Sends the lines of requests, and errors of the server, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = {"iceformer.requests": logging.INFO, "iceformer.serve": logging.INFO, "uvicorn.error": logging.WARNING}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.removeHandler(handler)
            logger.setLevel(level)
