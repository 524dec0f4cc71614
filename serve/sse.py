"""Server-sent events: the headers go out at once, comments while there is nothing to say, and the work ends when the
client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import SERVER, ApiError, ClientGoneError, stopping

_LOG = logging.getLogger("iceformer.serve")
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A response of JSON objects as they come.

    Args:
        events: the objects; an ApiError of it is the last of them.
        end: called when the response has ended, however it did; with what ended it early, if something did.
        ping: seconds without an object after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], end: Callable[[BaseException | None], None], ping: float
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=self.media_type)
        del self.headers["content-length"]
        self._events, self._end, self._ping = events, end, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, or as many as the client wants."""
        early: BaseException | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await until_gone(self._send_all(send), receive)
        except ClientGoneError as gone:
            early = gone
        except asyncio.CancelledError:
            early = stopping()
            await send({"type": "http.response.body", "body": _data(early.body()) + _DONE})
        except BaseException as error:
            early = error
            raise
        finally:
            self._end(early)

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        item: asyncio.Task[dict[str, Any] | None] | None = None
        try:
            while True:
                item = item or asyncio.ensure_future(_next(self._events))
                done, _ = await asyncio.wait({item}, timeout=self._ping)
                if not done:
                    await write(_PING)
                    continue
                try:
                    event = item.result()
                except Exception as raised:
                    error = raised if isinstance(raised, ApiError) else unexpected(raised)
                    self._end(error)
                    item = None
                    await write(_data(error.body()))
                    break
                item = None
                if event is None:
                    break
                await write(_data(event))
        finally:
            if item is not None:
                item.cancel()
                await asyncio.gather(item, return_exceptions=True)
        await write(_DONE, more=False)


async def until_gone(work: Any, receive: Receive) -> Any:
    """The result of a coroutine, which ends where the client leaves first.

    Raises:
        ClientGoneError: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"


def unexpected(error: BaseException) -> ApiError:
    """What clients are told of a mistake of the server, which its log has whole."""
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed, and its log says how: try again", kind=SERVER, code="internal_error")
