"""Errors as OpenAI's API shapes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

INVALID, AUTHENTICATION, RATE_LIMIT = "invalid_request_error", "authentication_error", "rate_limit_error"
SERVER, TIMEOUT = "server_error", "timeout_error"
CONTEXT_LENGTH = "context_length_exceeded"
CLIENT_GONE = 499
"""Status in log and metrics, as in nginx; nobody is there to get it."""


class ApiError(Exception):
    """A request that gets no answer, or no whole one.

    Attributes:
        status: of the HTTP response.
        message: what was found, what was expected, what to do.
        kind: OpenAI's `type`.
        code: for programs; None if the status says it all.
        param: the field of the request that is wrong; None if it is none.
        headers: of the response.
        details: more fields of the error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers, self.details = dict(headers or {}), details

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code, **self.details}
        return {"error": error}


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


@contextmanager
def refused(param: str | None = None) -> Iterator[None]:
    """A ValueError about what a client sent becomes status 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def stopping() -> ApiError:
    """The server ends, and has given the request the time that it had."""
    return ApiError(503, "the server stops: try again when it is back", kind=SERVER, code="shutdown")


def too_long(context: int, prompt: int, wanted: int, param: str) -> ApiError:
    """The prompt, or prompt and answer together, are longer than the context."""
    asked = (
        f" and {wanted} new tokens were asked for, {prompt + wanted} together" if wanted > 1 else ", which leaves none"
    )
    return ApiError(
        400,
        f"this model's context is {context} tokens, but the prompt has {prompt} tokens{asked}: shorten the prompt"
        f"{' or ask for fewer tokens' if wanted > 1 else ''}, or compile the model with a larger bucket",
        code=CONTEXT_LENGTH,
        param=param,
        context_tokens=context,
        prompt_tokens=prompt,
        max_tokens=wanted,
    )
