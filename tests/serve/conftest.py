"""A real server in a thread, over a tiny random Llama with a chat template, compiled once per run."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from openai import OpenAI

import iceformer
from iceformer.deploy.session import Session
from iceformer.serve.app import create_app
from iceformer.serve.metrics import Metrics
from iceformer.serve.service import Service
from iceformer.serve.settings import Settings
from iceformer.serve.worker import Worker

from ..conftest import Once
from ..deploy.conftest import source  # noqa: F401

CONTEXT, CHUNK, SLOTS, VOCABULARY, EOS = 256, 32, 2, 320, (2, 3)
NO_END = {str(token): -100 for token in EOS}
"""A bias that keeps a text going until its last allowed token."""
PROMPT = "Once upon a time there was a small fox"
MESSAGES: list[Any] = [{"role": "user", "content": "count the stars"}]
_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>{{ name | default('assistant') }}: {% endif %}"
)
_SECONDS = 60.0
_NO_KEEPING = httpx2.Limits(max_keepalive_connections=0)


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: where it listens.
        service: what is behind it.
        clients: that were made for it, closed at its end.
        http: another one, with a connection for each request.
    """

    url: str
    service: Service
    clients: list[OpenAI] = field(default_factory=list)
    http: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=_SECONDS, limits=_NO_KEEPING))

    @property
    def worker(self) -> Worker:
        """The first artifact's."""
        return next(iter(self.service.workers.values()))

    def client(self, **options: Any) -> OpenAI:
        """The official client, which does not try again, so that a failure shows."""
        client = OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})
        self.clients.append(client)
        return client

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """The response of a route."""
        return self.http.get(f"{self.url}{path}", **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        """The response of a route."""
        return self.http.post(f"{self.url}{path}", **options)

    def metric(self, line: str) -> float:
        """A figure of /metrics; 0 where there is none yet."""
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, condition: Callable[[], bool], seconds: float = _SECONDS) -> float:
        """Waits for a condition, and gives how long it took."""
        start = time.perf_counter()
        while not condition():
            assert time.perf_counter() - start < seconds, f"not so after {seconds} s"
            threading.Event().wait(0.01)
        return time.perf_counter() - start


@contextmanager
def serving(
    artifacts: dict[str, Path], *, load: Callable[[Path], Session] = iceformer.load, wait: bool = True, **settings: Any
) -> Iterator[Served]:
    """A server of artifacts on a free port, until the block ends."""
    asked = Settings(**{"drain": 5.0, **settings})
    workers = {name: Worker(name, lambda path=path: load(path), asked.queue) for name, path in artifacts.items()}
    service, ready = Service(workers, asked, Metrics(workers)), threading.Event()

    def loaded(worker: Worker) -> None:
        assert worker.failure is None, worker.failure
        if service.ready:
            ready.set()

    app = create_app(service, loaded)
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=round(asked.drain)
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        if wait:
            assert ready.wait(_SECONDS)
        served = Served(f"http://127.0.0.1:{port}", service)
        yield served
        for client in (*served.clients, served.http):
            client.close()
    finally:
        server.should_exit = True
        thread.join(_SECONDS)
        assert not thread.is_alive()


@contextmanager
def slow_calls(served: Served, seconds: float) -> Iterator[None]:
    """Every call of the engine takes so much longer."""
    runner: Any = served.worker.session.engine._runner
    call, pause = runner.call, threading.Event()

    def slowly(*arguments: Any) -> Any:
        pause.wait(seconds)
        return call(*arguments)

    runner.call = slowly
    try:
        yield
    finally:
        runner.call = call


@contextmanager
def held_calls(served: Served) -> Iterator[threading.Event]:
    """No call of the engine begins until the event is set."""
    runner: Any = served.worker.session.engine._runner
    call, go = runner.call, threading.Event()

    def later(*arguments: Any) -> Any:
        assert go.wait(_SECONDS)
        return call(*arguments)

    runner.call = later
    try:
        yield go
    finally:
        go.set()
        runner.call = call


@pytest.fixture(scope="session")
def artifact(source: tuple[Path, Any], once: Once) -> Path:  # noqa: F811
    """Two slots of 256 tokens."""

    def make(folder: Path) -> None:
        shutil.copytree(source[0], folder / "source")
        (folder / "source" / "chat_template.jinja").write_text(_TEMPLATE)
        checkpoint = iceformer.convert_checkpoint(folder / "source", folder / "checkpoint")
        options: dict[str, Any] = {"attention": iceformer.Exact(), "chunk": CHUNK, "batch": SLOTS}
        iceformer.compile(checkpoint, folder / "fox", buckets=(CONTEXT,), **options)

    return once("serve", make) / "fox"


@pytest.fixture(scope="session")
def session(artifact: Path) -> Session:
    """The same artifact without a server, to compare with."""
    return iceformer.load(artifact)


@pytest.fixture(scope="session")
def served(artifact: Path) -> Iterator[Served]:
    """A server as it comes, which pings often."""
    with serving({"fox": artifact}, ping=0.05) as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Served) -> OpenAI:
    """The official client."""
    return served.client()


def events_of(response: httpx2.Response) -> Iterator[Any]:
    """What a stream says: objects, "ping" and "done"."""
    for line in response.iter_lines():
        if line.startswith(": "):
            yield line[2:]
        elif line == "data: [DONE]":
            yield "done"
        elif line:
            yield json.loads(line.removeprefix("data: "))
