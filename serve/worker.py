"""`Worker`: one artifact and the thread that loads it, takes the engine's steps, and does all else that computes.

Requests come in from the event loop at any time and join between two steps. What the engine tells of them goes back
through a callback, which the thread calls.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ..deploy.engine import Engine, Event, PromptRead, Request, RequestLost
from ..deploy.session import Session
from .errors import RATE_LIMIT, SERVER, ApiError

Result = TypeVar("Result")
Deliver = Callable[[Event], None]

_LOG = logging.getLogger("iceformer.serve")
_LOADING_SECONDS = 5
"""When to ask again for an artifact that is being loaded."""
_LONGEST_RETRY = 60
_SHARED_QUEUE = 2
"""How many times the limit may wait, the last of them clients of which nothing waits yet."""
_WEIGHT = 0.2
"""Of the last request, in the mean duration of requests."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine.

    Attributes:
        request: the engine's.
        deliver: takes an event of it, in the worker's thread.
        submitted: when it came in.
        handle: the engine's; None before it is there.
        begun: whether anything was heard of it, or it has ended.
        ended: whether nothing more will be heard of it.
    """

    request: Request
    deliver: Deliver
    submitted: float
    handle: int | None = None
    begun: bool = False
    ended: bool = False


class Worker:
    """One artifact behind a name.

    Args:
        name: that clients ask for.
        load: opens the session, in the worker's thread.
        limit: how many prompts may wait.

    Attributes:
        failure: why the artifact could not be loaded, or its thread has ended; None while all is well.
        created: when the worker was made, in seconds since 1970.
        prefix_bytes: that earlier prompts take in memory.
    """

    def __init__(self, name: str, load: Callable[[], Session], limit: int) -> None:
        self.name, self.created, self.failure, self.prefix_bytes = name, int(time.time()), None, 0
        self._load, self._limit = load, limit
        self._session: Session | None = None
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._queued = 0
        self._queued_of: Counter[str] = Counter()
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name=f"iceformer {name}", daemon=True)

    def start(self, done: Callable[["Worker"], None]) -> None:
        """Begins to load; `done` is called in the worker's thread when that has ended, well or not, and on failure."""
        self._done = done
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests, closes the session, and waits for the thread; nothing may be asked afterwards."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether the artifact is loaded."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session; ApiError 503 before it is loaded."""
        if self._session is None:
            raise ApiError(
                503,
                f"the model {self.name!r} is being loaded: try again in a few seconds",
                kind=SERVER,
                code="model_loading",
                headers={"Retry-After": str(_LOADING_SECONDS)},
            )
        return self._session

    @property
    def queued(self) -> int:
        """How many prompts wait to be read, or to be encoded."""
        return self._queued

    @property
    def running(self) -> int:
        """How many requests have a slot of the engine."""
        return self._engine.running if self._engine is not None else 0

    def submit(self, requests: Sequence[Request], deliver: Sequence[Deliver]) -> list[Ticket]:
        """Takes requests, all of them or none.

        Args:
            requests: of the engine, whose sampling was checked against the vocabulary.
            deliver: of each request, what its events are given to.

        Raises:
            ApiError: 429 where too many wait, 503 before the artifact is loaded.
        """
        _ = self.session
        self._take_places(len(requests), requests[0].client)
        now = time.perf_counter()
        tickets = [Ticket(request, each, now) for request, each in zip(requests, deliver, strict=True)]
        for ticket in tickets:
            self._inbox.put(lambda ticket=ticket: self._add(ticket))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, from any thread; its slot is free before the next step. Nothing if it has ended."""
        with self._lock:
            if ticket.ended:
                return
            self._finish(ticket)
            if ticket.handle is not None and self._engine is not None:
                self._engine.cancel(ticket.handle)

    def run(self, function: Callable[[Session], Result]) -> "Future[Result]":
        """Calls a function in the worker's thread, between two steps; cancelling the future helps until it begins.

        Raises:
            ApiError: as `submit`.
        """
        session = self.session
        self._take_places(1, "")
        future: Future[Result] = Future()

        def call() -> None:
            start = time.perf_counter()
            with self._lock:
                self._leave_queue("")
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(session))
                except BaseException as error:
                    future.set_exception(error)
                self._note_seconds(time.perf_counter() - start)

        self._inbox.put(call)
        return future

    def _take_places(self, count: int, client: str) -> None:
        with self._lock:
            # A client that has nothing in the queue is not refused because another has filled it.
            if self._queued >= self._limit * (1 if self._queued_of[client] else _SHARED_QUEUE):
                seconds = min(max(1, round(self._mean_seconds * self._queued / self._slots)), _LONGEST_RETRY)
                raise ApiError(
                    429,
                    f"{self._queued} prompts wait for the model {self.name!r}, and no more may: try again in "
                    f"{seconds} s, or start the server with a larger --queue",
                    kind=RATE_LIMIT,
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._queued += count
            self._queued_of[client] += count

    def _leave_queue(self, client: str) -> None:
        self._queued -= 1
        self._queued_of[client] -= 1
        if not self._queued_of[client]:
            del self._queued_of[client]

    @property
    def _slots(self) -> int:
        return self.session.info.batch if self.session.info.model.kind == "decoder" else 1

    def _run(self) -> None:
        try:
            session = self._load()
            if not session.has_tokenizer:
                raise ValueError(f"the artifact {self.name!r} has no tokenizer, but clients send text: serve another")
            session.detokenize([])  # reads the tokenizer now, and not in the first request
        except BaseException as error:
            self.failure = error
            self._done(self)
            return
        self._session, self._engine = session, session.engine
        self._done(self)
        with session:
            try:
                while self._work(session, session.engine):
                    pass
            except BaseException as error:
                _LOG.exception("the thread of the model %s has ended", self.name)
                self._session, self.failure = None, error
                self._done(self)
            with self._lock:
                left = list(self._tickets.values())
            for ticket in left:
                self._tell(ticket, RequestLost(-1, "the server has stopped"))

    def _work(self, session: Session, engine: Engine) -> bool:
        """Does what has come in, and then a step, if there is one to take; False when the worker is to stop."""
        wait = not engine.busy
        while True:
            try:
                job = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if job is None:
                return False
            job()
            wait = False
        if engine.busy:
            try:
                events = engine.step()
            except Exception:
                # The next step tells those who lost their place in the cache.
                _LOG.exception("a call of the engine failed")
                return True
            for event in events:
                ticket = self._tickets.get(event.handle)
                if ticket is not None:
                    self._tell(ticket, event)
            if any(isinstance(event, PromptRead) for event in events):
                self.prefix_bytes = session.prefixes.size_in_bytes
        return True

    def _add(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.ended:
                return
            assert self._engine is not None
            ticket.handle = self._engine.add(ticket.request)
            self._tickets[ticket.handle] = ticket

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """Passes an event on, unless the request was cancelled."""
        with self._lock:
            if ticket.ended:
                return
            self._begin(ticket)
            if isinstance(event, RequestLost) or getattr(event, "finish_reason", None) is not None:
                self._finish(ticket)
        ticket.deliver(event)

    def _begin(self, ticket: Ticket) -> None:
        """The prompt waits no longer."""
        if not ticket.begun:
            ticket.begun = True
            self._leave_queue(ticket.request.client)

    def _finish(self, ticket: Ticket) -> None:
        self._begin(ticket)
        ticket.ended = True
        if ticket.handle is not None:
            self._tickets.pop(ticket.handle, None)
            self._note_seconds(time.perf_counter() - ticket.submitted)

    def _note_seconds(self, seconds: float) -> None:
        self._mean_seconds += _WEIGHT * (seconds - self._mean_seconds)


Registry = dict[str, Worker]
"""Workers by name."""


def find(workers: Registry, name: Any) -> Worker:
    """The worker that a request names; the only one if it names none.

    Raises:
        ApiError: 404 for a name that there is not, 400 for no name where there are several.
    """
    if name is None and len(workers) == 1:
        return next(iter(workers.values()))
    names = ", ".join(workers)
    if name is None:
        raise ApiError(400, f"the request names no model, expected one of: {names}", param="model")
    if name not in workers:
        raise ApiError(
            404, f"there is no model {name!r}, expected one of: {names}", code="model_not_found", param="model"
        )
    return workers[name]
