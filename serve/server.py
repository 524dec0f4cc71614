"""`serve`: artifacts behind a port until somebody ends it."""

import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from ..deploy.session import load
from .app import create_app
from .metrics import Metrics
from .record import logging_to_stderr
from .service import Service
from .settings import Settings
from .worker import Worker

_BACKLOG = 2048
"""Connections that the system holds until they are accepted."""


def serve(
    artifacts: Mapping[str, Path],
    settings: Settings,
    *,
    host: str,
    port: int,
    cache_ram: int,
    started: Callable[[str], None],
    ready: Callable[[str], None],
) -> None:
    """Serves artifacts until SIGINT or SIGTERM, after which running requests are given `settings.drain` seconds.

    Args:
        artifacts: folders by the names that clients ask for.
        settings: how clients are treated.
        host: address to listen at.
        port: to listen at; 0 for any free one.
        cache_ram: bytes of memory for earlier prompts, of each artifact.
        started: told the URL when the port is open.
        ready: told the name of each artifact when it is loaded.

    Raises:
        OSError: the address cannot be used.
        ValueError, OSError: an artifact cannot be loaded, as `iceformer.load`.
    """
    failures: list[BaseException] = []

    def loaded(worker: Worker) -> None:
        if worker.failure is not None:
            failures.append(worker.failure)
            server.should_exit = True
        else:
            ready(worker.name)

    workers = {
        name: Worker(
            name, lambda path=path: load(path, cache_ram=cache_ram, max_stall=settings.max_stall), settings.queue
        )
        for name, path in artifacts.items()
    }
    app = create_app(Service(workers, settings, Metrics(workers)), loaded)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
    server = uvicorn.Server(config)
    with _listening(host, port) as listener:
        name, number = listener.getsockname()[:2]
        started(f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}")
        with logging_to_stderr(), _sigterm_ends(server):
            server.run(sockets=[listener])
    if failures:
        raise failures[0]


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that accepts connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"{host} port {port} cannot be used ({error.strerror}): give another") from None
        listener.listen(_BACKLOG)
        listener.set_inheritable(True)
        yield listener


@contextmanager
def _sigterm_ends(server: uvicorn.Server) -> Iterator[None]:
    """SIGTERM before uvicorn listens for it; and after it, because uvicorn raises the signal that ended it once more,
    which is not to kill a process that has ended well."""

    def end(number: int, frame: Any) -> None:
        server.should_exit = True

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
