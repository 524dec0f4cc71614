"""`/v1/chat/completions` and `/v1/completions`."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..deploy.generation_options import Choices, SamplingOptions, choices
from ..deploy.session import Session
from .answers import Answer, ChatShape, Shape, TextShape
from .body import read
from .errors import CLIENT_GONE, ApiError, ClientGoneError, refused, stopping
from .generation import Generation, prepare, timings, usage
from .prompts import Prompt, Room, chat_prompt, text_prompt
from .record import of
from .schemas import ChatBody, CompletionBody, Writing
from .service import Service, fingerprint
from .sse import EventStream, until_gone
from .worker import Worker

_COMPLETION_TOKENS = 16
"""New tokens of a completion that asks for no number, as in OpenAI's API; a chat may fill the context."""
_RESERVED = 512
"""Tokens that are kept free for the answer where a prompt is cut and no number was asked for."""
_SEED_BITS = 63


async def chat(service: Service, request: Request) -> Response:
    """Answers a conversation."""
    body = await read(request, ChatBody, service.settings)
    worker, session = service.worker(request, body.model, "decoder")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    n, room = _n(service, body, 1), _room(service, session, asked)
    prompt = await asyncio.to_thread(chat_prompt, session, body.messages, body.chat_template_kwargs, room)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = [_options(service, session, body, prompt, room, asked, None, logprobs)]
    generation = prepare(session, worker, [prompt], options, n, service.settings.timeout, _client(request, body))
    return await _answer(service, request, worker, session, generation, ChatShape(session), body, n)


async def complete(service: Service, request: Request) -> Response:
    """Continues texts."""
    body = await read(request, CompletionBody, service.settings)
    worker, session = service.worker(request, body.model, "decoder")
    n, asked = _n(service, body, len(body.prompts)), body.max_tokens
    room = _room(service, session, asked)

    def read_prompts() -> list[Prompt]:
        return [text_prompt(session, each, body.add_special_tokens, room) for each in body.prompts]

    prompts = await asyncio.to_thread(read_prompts)
    options = [
        _options(service, session, body, prompt, room, asked, _COMPLETION_TOKENS, body.logprobs) for prompt in prompts
    ]
    generation = prepare(session, worker, prompts, options, n, service.settings.timeout, _client(request, body))
    return await _answer(service, request, worker, session, generation, TextShape(session), body, n)


async def _answer(
    service: Service,
    request: Request,
    worker: Worker,
    session: Session,
    generation: Generation,
    shape: Shape,
    body: Writing,
    n: int,
) -> Response:
    """Writes the texts, and sends them as they come or as a whole."""
    answer, record = Answer(generation, shape, worker.name, fingerprint(session), n), of(request)
    ended = False

    def end(early: BaseException | None) -> None:
        nonlocal ended
        if ended:
            return
        ended = True
        generation.cancel()
        record.figures |= _figures(generation, n)
        if isinstance(early, ClientGoneError):
            record.status, record.error = CLIENT_GONE, "client_gone"
        elif isinstance(early, ApiError):
            record.error = early.code
        service.metrics.note_generation(worker.name, generation)

    record.figures["stream"] = bool(body.stream)
    generation.submit()
    if body.stream:
        chunks = answer.chunks(includes_usage=body.includes_usage, progress=bool(body.return_progress))
        return EventStream(chunks, end, service.settings.ping)
    early: BaseException | None = None
    try:
        return JSONResponse(await until_gone(answer.whole(), request.receive))
    except asyncio.CancelledError:
        early = stopping()
        raise early from None
    except BaseException as error:
        early = error
        raise
    finally:
        end(early)


def _client(request: Request, body: Writing) -> str:
    """Who asks, to whom turns are given: an address, and a user where the request names one."""
    address = request.client.host if request.client is not None else ""
    user = (body.model_extra or {}).get("user")
    return f"{address} {user}" if isinstance(user, str) else address


def _n(service: Service, body: Writing, prompts: int) -> int:
    """How many texts continue each prompt, checked with the other fields that go together."""
    n, most = 1 if body.n is None else body.n, service.settings.max_choices
    if n < 1:
        raise ApiError(400, f"n is {n}, expected at least 1", param="n")
    if n * prompts > most:
        raise ApiError(
            400,
            f"{prompts} prompts with n {n} ask for {n * prompts} texts, and this server writes at most {most} for a "
            "request: ask for fewer",
            param="n",
        )
    for name in ("stream_options", "return_progress"):
        if getattr(body, name) and not body.stream:
            raise ApiError(400, f"{name} needs stream: true", param=name)
    return n


def _room(service: Service, session: Session, asked: int | None) -> Room:
    """What prompts must fit into."""
    context, most = session.info.buckets[-1].capacity, service.settings.max_tokens
    if asked is not None and asked < 1:
        raise ApiError(400, f"max_tokens is {asked}, expected at least 1", param="max_tokens")
    if asked is not None and most is not None and asked > most:
        raise ApiError(
            400, f"max_tokens is {asked}, and this server writes at most {most}: ask for fewer", param="max_tokens"
        )
    overflow = service.settings.overflow
    reserved = 1 if overflow == "error" else min(_RESERVED, context // 4)
    return Room(context, asked or reserved, overflow)


def _options(
    service: Service,
    session: Session,
    body: Writing,
    prompt: Prompt,
    room: Room,
    asked: int | None,
    default: int | None,
    logprobs: int | None,
) -> Choices:
    """The options of the texts that continue a prompt, checked."""
    left = room.context - len(prompt.ids)
    defaults = session.info.model.generation
    own = (defaults.max_new_tokens if defaults is not None else None) or default or left
    tokens = min(asked or own, left, service.settings.max_tokens or left)
    given: dict[str, Any] = {
        name: getattr(body, name)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    given |= {"logit_bias": _biases(body.logit_bias), "stop": body.stops, "logprobs": logprobs}
    options = SamplingOptions(**{name: value for name, value in given.items() if value is not None})
    seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed % (1 << _SEED_BITS)
    with refused():
        chosen = choices(defaults, tokens, body.temperature, seed, options)
        chosen.sampling.check_vocabulary(session.info.model.vocab_size or 0)
    return chosen


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """`logit_bias` with its keys as numbers, which JSON cannot have."""
    if given is None:
        return None
    wrong = next((key for key in given if not (key.isascii() and key.isdecimal() and len(key) < 12)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias has the key {wrong[:40]!r}, expected token ids", param="logit_bias")
    return {int(key): value for key, value in given.items()}


def _figures(generation: Generation, n: int) -> dict[str, Any]:
    """What the log says of a request."""
    used, times = usage(generation, n), timings(generation)
    reasons: Sequence[str] = sorted({text.finish_reason or "unfinished" for text in generation.texts})
    return {
        "texts": len(generation.texts),
        "prompt_tokens": used["prompt_tokens"],
        "cached_tokens": times["cache_n"],
        "completion_tokens": used["completion_tokens"],
        "queue_ms": times["queue_ms"],
        "prompt_ms": times["prompt_ms"],
        "predicted_ms": times["predicted_ms"],
        "finish": ",".join(reasons),
    }
