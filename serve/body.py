"""Reading the body of a request: no more than is allowed, and no longer than a client keeps sending."""

import asyncio

from starlette.requests import Request

from .errors import TIMEOUT, ApiError, ClientGoneError
from .schemas import Parsed, parse
from .settings import Settings

_LARGE = 1 << 16
"""From so many bytes on, JSON is parsed beside the event loop."""


async def read(request: Request, schema: type[Parsed], settings: Settings) -> Parsed:
    """The body of a request as `schema` has it.

    Raises:
        ApiError: 413 for a body that is too large, 408 for one that does not come, and as `schemas.parse`.
        ClientGoneError: the client left before its end.
    """
    data = await _bytes(request, settings)
    return await asyncio.to_thread(parse, schema, data) if len(data) > _LARGE else parse(schema, data)


async def _bytes(request: Request, settings: Settings) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > settings.max_body:
        raise _too_large(settings)
    parts, size, more = [], 0, True
    while more:
        try:
            async with asyncio.timeout(settings.body_timeout):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"nothing of the body came for {settings.body_timeout:g} s: send it again",
                kind=TIMEOUT,
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > settings.max_body:
            raise _too_large(settings)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(settings: Settings) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {settings.max_body} bytes: send less, or start the server with a larger --max-body",
        code="body_too_large",
        headers={"Connection": "close"},
    )
