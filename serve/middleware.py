"""What happens to every request, before and after its route: a record of it, and the API key."""

import hmac

from prometheus_client import Gauge
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import AUTHENTICATION, ApiError
from .metrics import Metrics
from .record import LOG, Record, of, put
from .sse import unexpected

LIVENESS = "/health/live"
_QUIET = (LIVENESS, "/health/ready", "/metrics")
"""Routes that machines ask all the time, of which only errors are logged."""


class Observe:
    """Logs and counts requests, gives each an `x-request-id`, and answers where the server itself fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope["method"])
        put(scope, record)
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        gauge: Gauge = self._metrics.open
        with gauge.track_inprogress():
            try:
                await self._app(scope, receive, send_on)
            except Exception as error:
                answer = unexpected(error)
                record.status, record.error = answer.status, answer.code
                if not started:
                    await response(answer)(scope, receive, send_on)
            finally:
                route = scope.get("route")
                record.route = getattr(route, "path", "other")
                self._metrics.note(record)
                if record.route not in _QUIET or record.error is not None:
                    LOG.info(record.line())


class ApiKey:
    """Refuses requests without the key, except to `LIVENESS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, if it has the key."""
        if scope["type"] == "lifespan" or scope.get("path") == LIVENESS or self._fits(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
            kind=AUTHENTICATION,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        of(scope).error = error.code
        await response(error)(scope, receive, send)

    def _fits(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        candidates = (given.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        # Both are compared, and each in a time that says nothing about the key.
        fits = [hmac.compare_digest(each.encode("latin-1"), self._key) for each in candidates]
        return any(fits)


def response(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error.body(), error.status, error.headers)
