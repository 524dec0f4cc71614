"""`/cache/save` and `/cache/restore`: what is kept of a prompt, on disk, for this server or a later one."""

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..deploy.manifest import BucketInfo
from ..deploy.prefix_cache import KeptPiece, piece_keys, reading_calls
from ..deploy.prefix_file import PrefixError, read_prefix, write_prefix
from ..deploy.session import Session
from .body import read
from .errors import SERVER, ApiError
from .schemas import RestoreBody, SaveBody
from .service import Service
from .texts import ids_of


async def save(service: Service, request: Request) -> Response:
    """Writes what is kept of a prompt that was read before; it reads nothing itself."""
    body = await read(request, SaveBody, service.settings)
    worker, session = service.worker(request, body.model, "decoder")
    folder = _folder(service, body.name)
    ids = np.asarray(await asyncio.to_thread(ids_of, session, body), np.int32)
    bucket, pieces = await service.run(request, worker, lambda session, _: _kept(session, ids))
    if not pieces:
        raise ApiError(404, "nothing is kept of this prompt: ask the model with it first", code="not_cached")
    try:
        await asyncio.to_thread(write_prefix, folder, session.fingerprint, bucket, pieces)
    except FileExistsError:
        raise ApiError(409, f"there is a cache {body.name!r} already: give another name", param="name") from None
    except OSError as error:
        raise ApiError(507, f"the cache cannot be written ({error.strerror})", kind=SERVER) from error
    return JSONResponse({"name": body.name, "tokens": sum(piece.tokens for piece in pieces), "total": len(ids)})


async def restore(service: Service, request: Request) -> Response:
    """Maps what was saved into memory, so that prompts that begin with it start behind it."""
    body = await read(request, RestoreBody, service.settings)
    worker, session = service.worker(request, body.model, "decoder")
    folder = _folder(service, body.name)
    try:
        tokens, pieces = await asyncio.to_thread(read_prefix, folder, session.fingerprint, session.info.buckets)
    except FileNotFoundError:
        raise ApiError(404, f"there is no cache {body.name!r}: save one first", param="name") from None
    except PrefixError:
        raise ApiError(
            409,
            f"the cache {body.name!r} is of another artifact or another kind of machine, or was changed: save it again",
            param="name",
        ) from None

    def keep(session: Session) -> None:
        for piece in pieces:
            session.prefixes.keep(piece)

    await service.run(request, worker, lambda session, _: keep(session))
    return JSONResponse({"name": body.name, "tokens": tokens})


def _folder(service: Service, name: str) -> Path:
    folder = service.settings.cache_dir
    if folder is None:
        raise ApiError(400, "this server keeps no caches on disk: start it with --cache-dir", code="no_cache_dir")
    return folder / name


def _kept(session: Session, ids: NDArray[np.int32]) -> tuple[BucketInfo, list[KeptPiece]]:
    """What is kept of a prompt, in the bucket, and by the calls, that have most of it."""
    found = [
        (bucket, session.prefixes.find(piece_keys(bucket, ids, sizes)))
        for bucket in session.info.buckets
        for sizes in reading_calls(bucket, len(ids))
    ]
    return max(found, key=lambda each: sum(piece.tokens for piece in each[1]))
