"""`Engine`: several requests at once over one artifact of a decoder, step by step. It knows tokens and no text.

A request waits for a slot in the smallest bucket that has room for it. Each step takes one piece of a prompt, or as
many as a bound of seconds allows, and writes one token of every request whose prompt is done, so that a long prompt
does not stop the others' writing. Clients take turns. Where texts repeat what stands before, a step checks guesses of
their next tokens and writes those that were right.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .cache_copy import Layers, copy_in, copy_out, copy_ring_places, restore_ring_places, run_arrays
from .encoding import bucket_for
from .manifest import TAIL_ENTRY, BucketInfo
from .pace import Pace
from .prefix_cache import KeptPiece, Key, PrefixCache, piece_keys, reading_calls
from .runner import Runner
from .sampling import Sampler, Sampling, TokenLogprobs, top_logprobs
from .slots import Slots
from .speculation import CallCosts, Guesser, most_guesses, share_rows
from .turns import Turns

FinishReason = Literal["stop", "length", "capacity"]

_CALL_FAILED = "a call on the same cache failed or was interrupted: generate it again"


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        ids: int32 [n], the prompt, checked: not empty, in the vocabulary, not longer than the largest bucket.
        max_new_tokens: how many tokens to write at most, at least 1.
        sampling: how tokens are chosen.
        logprobs: of how many of the most likely tokens the log-probability is told beside each token; None for none,
            not even its own.
        speculate: check guesses of the next tokens where that is faster. What is written is the same.
        client: who asks. Clients take turns in getting slots and in reading.
    """

    ids: NDArray[np.int32]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    speculate: bool = True
    client: str = ""


@dataclass(frozen=True)
class PromptRead:
    """More of a request's prompt is in the cache.

    Attributes:
        handle: of the request.
        done: how many tokens of the prompt are in the cache.
        total: how many the prompt has.
        restored: how many an earlier prompt had left there.
        seconds: since the engine began to read the prompt; what others wrote in between is in them.
    """

    handle: int
    done: int
    total: int
    restored: int
    seconds: float


@dataclass(frozen=True)
class TokenWritten:
    """A request's next token.

    Attributes:
        handle: of the request.
        id: the token.
        finish_reason: why it is the last: "stop" at an end-of-sequence token, "length" after max_new_tokens, "capacity"
            when the bucket was full; None if it is not.
        time: when it was chosen, in seconds, by `time.perf_counter`; events that differ in it alone are equal.
        logprobs: of the token, if they were asked for.
        proposed: how many guesses of this and later tokens were checked in the call that wrote it; 0 where that wrote
            others of the request before.
        guessed: whether the token was one of these guesses.
    """

    handle: int
    id: int
    finish_reason: FinishReason | None
    time: float = field(compare=False)
    logprobs: TokenLogprobs | None = None
    proposed: int = 0
    guessed: bool = False


@dataclass(frozen=True)
class RequestLost:
    """A request ended before its last token.

    Attributes:
        handle: of the request.
        why: a call of its bucket failed, which cost it its place in the cache, or no token can be chosen.
    """

    handle: int
    why: str


Event = PromptRead | TokenWritten | RequestLost


@dataclass(eq=False)
class _Running:
    """A request with a place in the cache.

    Attributes:
        sizes: tokens of the calls that read the prompt.
        keys: of the prompt's pieces that may be kept for later prompts.
        pieces: how many calls' worth of the prompt is in the cache.
        read: tokens of the prompt that are in the cache.
        restored: how many of them an earlier prompt had left.
        began: when the first piece of the prompt was begun, by `time.perf_counter`; None before.
        written: how many tokens the model wrote.
        last: the last of them, which is not in the cache yet.
        guesser: guesses the next ones; None where that is not wanted.
    """

    handle: int
    request: Request
    bucket: BucketInfo
    slot: int
    sampler: Sampler
    sizes: Sequence[int]
    keys: Sequence[Key] = ()
    pieces: int = 0
    read: int = 0
    restored: int = 0
    began: float | None = None
    written: int = 0
    last: int = 0
    guesser: Guesser | None = None

    @property
    def writes(self) -> bool:
        """Whether the prompt is done."""
        return self.read == len(self.request.ids)

    @property
    def position(self) -> int:
        """Where the last token goes in the cache."""
        return len(self.request.ids) + self.written - 1

    def guess(self, most: int) -> list[int]:
        """Guesses of the tokens behind the last, up to `most`, none of which may be wrong to have in the cache."""
        left = self.request.max_new_tokens - self.written - 1
        most = min(most, left, most_guesses(self.bucket, self.position))
        return self.guesser.guess(most) if self.guesser and most > 0 else []


@dataclass(eq=False)
class _Place:
    """A bucket's slots, and the requests that wait for one."""

    slots: Slots
    waiting: deque[tuple[int, Request]] = field(default_factory=deque)


class Engine:
    """Continues requests. Not safe for threads: one at a time calls it, except `cancel`, which any thread may.

    Args:
        runner: of the artifact.
        prefixes: where pieces of prompts are kept for later ones; None keeps none.
        max_stall: seconds of a step for reading prompts, which is as long as other requests then wait for their next
            tokens and a request that was cancelled keeps its slot; at least one small piece is read. None for one call
            of any length.
    """

    def __init__(self, runner: Runner, prefixes: PrefixCache | None = None, max_stall: float | None = None) -> None:
        self._runner, self._info = runner, runner.info
        self._prefixes = prefixes or PrefixCache(0)
        self._vocab_size = self._info.model.vocab_size or 0  # an encoder may have none, and is given no requests
        self._places = {bucket.capacity: _Place(Slots(bucket, self._info.batch)) for bucket in self._info.buckets}
        self._paces = {bucket.capacity: Pace(bucket, max_stall) for bucket in self._info.buckets}
        self._reads, self._seats = Turns(), Turns()
        self._costs = {bucket.capacity: CallCosts() for bucket in self._info.buckets}
        # Only the native kernels compute a token alike whether it comes alone or with others.
        self._speculates = runner.tier == "native" and bool(self._info.environment.kernels)
        self._running: dict[int, _Running] = {}
        self._events: list[Event] = []
        self._cancelled: set[int] = set()
        self._next_handle = 0

    def add(self, request: Request) -> int:
        """Takes a request, and gives the handle that its events have; ValueError for a bias of unknown tokens."""
        request.sampling.check_vocabulary(self._vocab_size)
        handle = self._next_handle
        self._next_handle += 1
        self._places[self._bucket(request).capacity].waiting.append((handle, request))
        return handle

    def cancel(self, handle: int) -> None:
        """Ends a request before the next step, without an event; does nothing for one that has ended."""
        self._cancelled.add(handle)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do in a step."""
        self._sweep()
        return bool(self._running or self._events or any(place.waiting for place in self._places.values()))

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return sum(len(place.waiting) for place in self._places.values())

    def step(self) -> list[Event]:
        """One piece of a prompt that is not done, or as many as are within the bound, and one token of every request
        whose prompt is, and those behind it that were guessed right.

        A call that fails raises; the requests of its bucket are lost, which the next step tells, and all others go on.
        The next step also gives what happened before the failure.
        """
        self._sweep()
        self._seat()
        self._read_some()
        for bucket in self._info.buckets:
            writing = [running for running in self._running.values() if running.bucket is bucket and running.writes]
            if writing:
                self._write(bucket, writing)
        events, self._events = self._events, []
        return events

    def has_room(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens can be taken in at once, by `score` or `logits`."""
        self._sweep()
        place = self._places[bucket_for(self._info, tokens).capacity]
        return place.slots.free and not place.waiting

    def score(self, ids: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int32]]]:
        """Chunk by chunk: where it ends, the log-probability of each next token, and the model's own, [chunk] each.

        There must be room; it takes a slot until the last chunk.
        """
        bucket, targets = bucket_for(self._info, len(ids)), np.roll(ids, -1)
        with self._slot(bucket, len(ids)) as slot:
            for start in range(0, len(ids), bucket.chunk):
                pieces = [_piece(row, start, bucket.chunk) for row in (ids, targets)]
                logprobs, argmax = self._call(bucket, "score", *pieces, *_row(slot, start, len(ids)))
                yield start + bucket.chunk, np.array(logprobs)[0], np.array(argmax)[0]

    def logits(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [vocab] after the last token; there must be room."""
        bucket = bucket_for(self._info, len(ids))
        with self._slot(bucket, len(ids)) as slot:
            start, logits = 0, None
            for size in bucket.piece_sizes(len(ids)):
                logits = self._prefill(bucket, slot, ids, start, size)
                start += size
        assert logits is not None
        return logits

    def prefix(self, ids: NDArray[np.int32], room: int) -> Iterator[KeptPiece]:
        """Piece by piece, what later prompts can start from that begin with these tokens.

        There must be room for these and `room` more tokens, which decide on the bucket.
        """
        bucket = bucket_for(self._info, len(ids) + room)
        sizes = bucket.piece_sizes(len(ids))
        keys = piece_keys(bucket, ids, sizes)
        found = self._prefixes.find(keys)
        with self._slot(bucket, len(ids)) as slot:
            start = 0
            for piece in found:
                self._put(bucket, slot, start, piece)
                yield piece
                start += piece.tokens
            for key, size in zip(keys[len(found) :], sizes[len(found) :], strict=False):
                self._prefill(bucket, slot, ids, start, size)
                yield self._taken(bucket, slot, start, size, key)
                start += size

    @contextmanager
    def _slot(self, bucket: BucketInfo, tokens: int) -> Iterator[int]:
        """A slot for so many tokens; there must be one."""
        slots = self._places[bucket.capacity].slots
        slot = slots.take(tokens)
        try:
            yield slot
        finally:
            slots.give_back(slot)

    def _prefill(
        self, bucket: BucketInfo, slot: int, ids: NDArray[np.int32], start: int, size: int
    ) -> NDArray[np.float32]:
        """Reads a piece of a prompt, and gives the logits [vocab] after its last token."""
        entry = "prefill" if size == bucket.chunk else TAIL_ENTRY
        (logits,) = self._call(bucket, entry, _piece(ids, start, size), *_row(slot, start, len(ids)))
        return np.asarray(logits)[0]

    def _bucket(self, request: Request) -> BucketInfo:
        return bucket_for(self._info, len(request.ids) + request.max_new_tokens - 1)

    def _sweep(self) -> None:
        """Lets go of what was cancelled."""
        while self._cancelled:
            handle = self._cancelled.pop()
            if handle in self._running:
                self._release(self._running[handle])
            for place in self._places.values():
                place.waiting = deque(item for item in place.waiting if item[0] != handle)

    def _seat(self) -> None:
        """Gives free slots to those who wait."""
        for bucket in self._info.buckets:
            place = self._places[bucket.capacity]
            while place.waiting and place.slots.free:
                handle, request = self._next_waiting(place)
                slot = place.slots.take(len(request.ids) + request.max_new_tokens)
                sampler = Sampler(request.sampling, request.ids, self._vocab_size)
                sizes = self._sizes(bucket, request.ids)
                keys = piece_keys(bucket, request.ids, sizes)
                speculates = request.speculate and self._speculates
                guesser = Guesser(request.ids, request.max_new_tokens) if speculates else None
                self._running[handle] = _Running(handle, request, bucket, slot, sampler, sizes, keys, guesser=guesser)

    def _next_waiting(self, place: _Place) -> tuple[int, Request]:
        """Takes the oldest request of the client that has the fewest slots; of several, of the one that was given one
        longest ago."""
        slots = Counter(running.request.client for running in self._running.values())
        item = min(place.waiting, key=lambda x: (slots[x[1].client], self._seats.last(x[1].client), x[0]))
        place.waiting.remove(item)
        self._seats.take(item[1].client, self._clients())
        return item

    def _clients(self) -> set[str]:
        """All that have a slot or wait for one."""
        waiting = (request.client for place in self._places.values() for _, request in place.waiting)
        return {*waiting, *(running.request.client for running in self._running.values())}

    def _sizes(self, bucket: BucketInfo, ids: NDArray[np.int32]) -> Sequence[int]:
        """The calls that read a prompt: by the bucket's pace, but first by those that read what is kept of it."""
        wholes, pieces = reading_calls(bucket, len(ids))
        kept_wholes, kept_pieces = (self._prefixes.count(piece_keys(bucket, ids, x)) for x in (wholes, pieces))
        more_in_wholes = sum(wholes[:kept_wholes]) - sum(pieces[:kept_pieces])
        if self._paces[bucket.capacity].whole:
            return wholes if more_in_wholes >= 0 else pieces
        if more_in_wholes <= 0:
            return pieces
        kept = wholes[:kept_wholes]
        return kept + pieces[sum(kept) // bucket.tail :]

    def _release(self, running: _Running) -> None:
        self._places[running.bucket.capacity].slots.give_back(running.slot)
        del self._running[running.handle]

    def _read_some(self) -> None:
        """Reads a piece of a prompt, and more as long as they are within the bound. Clients take turns; of one client,
        the prompt of which least is left goes first."""
        start = time.perf_counter()
        read = False
        while not (read and self._cancelled):
            reading = min((x for x in self._running.values() if not x.writes), key=self._reading_place, default=None)
            if reading is None:
                return
            size = reading.sizes[reading.pieces]
            if read and not self._paces[reading.bucket.capacity].fits(size, time.perf_counter() - start):
                return
            self._reads.take(reading.request.client, self._clients())
            self._read(reading)
            read = True

    def _reading_place(self, running: _Running) -> tuple[int, int, int]:
        request = running.request
        return self._reads.last(request.client), len(request.ids) - running.read, running.handle

    def _read(self, running: _Running) -> None:
        """Reads the next piece of a prompt."""
        if running.began is None:
            running.began = time.perf_counter()
        self._restore(running)
        bucket, ids, start, number = running.bucket, running.request.ids, running.read, running.pieces
        size, began = running.sizes[number], time.perf_counter()
        logits = self._prefill(bucket, running.slot, ids, start, size)
        self._paces[bucket.capacity].note(size, time.perf_counter() - began)
        running.read, running.pieces = min(start + size, len(ids)), number + 1
        self._keep(running, number, start, size)
        self._tell_read(running)
        if running.writes:
            self._sample(running, logits)

    def _tell_read(self, running: _Running) -> None:
        assert running.began is not None
        seconds = time.perf_counter() - running.began
        read, total = running.read, len(running.request.ids)
        self._events.append(PromptRead(running.handle, read, total, running.restored, seconds))

    def _restore(self, running: _Running) -> None:
        """Takes the next pieces of a prompt from earlier prompts, as far as they are kept."""
        found = self._prefixes.find(running.keys[running.pieces :])
        for piece in found:
            self._put(running.bucket, running.slot, running.read, piece)
            running.pieces += 1
            running.read += piece.tokens
            running.restored += piece.tokens
        if found:
            self._tell_read(running)

    def _keep(self, running: _Running, number: int, start: int, size: int) -> None:
        """Keeps a piece of a prompt that was read just now, if later prompts may use it and there is room."""
        bucket, keys = running.bucket, running.keys
        if number >= len(keys) or keys[number] in self._prefixes:
            return
        arrays = run_arrays(bucket.cache, start, start + size)
        memory = sum(array.size_in_bytes for layer in arrays for array in layer.values())
        if self._prefixes.has_room(memory, keys[:number]):
            self._prefixes.keep(self._taken(bucket, running.slot, start, size, keys[number]), keys[:number])

    def _taken(self, bucket: BucketInfo, slot: int, start: int, size: int, key: Key) -> KeptPiece:
        """A copy of the piece of a slot that begins at `start` and was read just now."""
        pages = self._places[bucket.capacity].slots.pages(slot)
        views = self._runner.cache_views(bucket)
        return KeptPiece(key, size, copy_out(views, bucket.cache, slot, pages, start, start + size))

    def _put(self, bucket: BucketInfo, slot: int, start: int, piece: KeptPiece) -> None:
        """Puts a piece back into a slot."""
        pages = self._places[bucket.capacity].slots.pages(slot)
        views = self._runner.cache_views(bucket)
        copy_in(views, bucket.cache, slot, pages, start, start + piece.tokens, piece.layers)

    def _write(self, bucket: BucketInfo, writing: Sequence[_Running]) -> None:
        """One more token of each request, and those behind it that are guessed right, all of them in one call."""
        guesses = self._guesses(bucket, writing)
        positions = [range(x.position + 1, x.position + 1 + len(own)) for x, own in zip(writing, guesses, strict=True)]
        rings = self._ring_places(bucket, writing, positions)
        checks, start = any(guesses), time.perf_counter()
        logits = self._decode(bucket, "check" if checks else "decode", writing, guesses)
        self._costs[bucket.capacity].note(time.perf_counter() - start, checked=checks)
        rights = [self._sample_all(*each) for each in zip(writing, guesses, logits, strict=True)]
        if rings:
            views = self._runner.cache_views(bucket)
            for running, places, kept, right in zip(writing, positions, rings, rights, strict=True):
                restore_ring_places(views, bucket.cache, running.slot, places[right:], kept)

    def _guesses(self, bucket: BucketInfo, writing: Sequence[_Running]) -> list[list[int]]:
        """Guesses to check of each request's next tokens; none of any where that would take longer."""
        spare = bucket.entries["check"].arguments["tokens"].shape[0] - len(writing)
        guesses = [running.guess(spare) for running in writing]
        rates = [running.guesser.rate if running.guesser else 0.0 for running in writing]
        counts = share_rows(guesses, rates, spare, self._costs[bucket.capacity].ratio)
        return [guess[:count] for guess, count in zip(guesses, counts, strict=True)]

    def _ring_places(self, bucket: BucketInfo, writing: Sequence[_Running], positions: Sequence[range]) -> list[Layers]:
        """What is in the rings where guesses go: a wrong one stands in the place of a token that is seen still."""
        if not any(positions) or not any(bucket.cache.windows):
            return []
        views = self._runner.cache_views(bucket)
        return [copy_ring_places(views, bucket.cache, x.slot, own) for x, own in zip(writing, positions, strict=True)]

    def _decode(
        self, bucket: BucketInfo, entry: str, writing: Sequence[_Running], guesses: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """The logits of each request after its last token and after each guess behind it, [1 + guesses, vocab]."""
        rows = bucket.entries[entry].arguments["tokens"].shape[0]
        tokens, slot, offset = np.zeros(rows, np.int32), np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
        parts, end = [], 0
        for running, guess in zip(writing, guesses, strict=True):
            part = slice(end, end := end + 1 + len(guess))
            tokens[part], slot[part] = (running.last, *guess), running.slot
            offset[part] = range(running.position, running.position + 1 + len(guess))
            parts.append(part)
        (result,) = self._call(bucket, entry, tokens, slot, offset)
        logits = np.asarray(result)
        return [logits[part] for part in parts]

    def _sample_all(self, running: _Running, guesses: Sequence[int], logits: NDArray[np.float32]) -> int:
        """Writes a token, and the next as long as the one before is as guessed; gives how many were."""
        proposed = len(guesses)
        for right, (guess, after) in enumerate(zip((*guesses, None), logits, strict=True)):
            self._sample(running, after, guess, proposed)
            if running.handle not in self._running or running.last != guess:
                return right
            proposed = 0
        return len(guesses)

    def _sample(
        self, running: _Running, logits: NDArray[np.float32], guess: int | None = None, proposed: int = 0
    ) -> None:
        """Writes a token, which may be the one that was guessed, from the logits after the last."""
        try:
            running.last = running.sampler.choose(logits)
        except RuntimeError as error:  # its own logits are wrong, and the others go on
            self._events.append(RequestLost(running.handle, str(error)))
            self._release(running)
            return
        running.sampler.accept(running.last)
        if running.guesser is not None:
            running.guesser.accept(running.last)
        running.written += 1
        reason: FinishReason | None = None
        if running.last in self._info.model.eos_token_ids:
            reason = "stop"
        elif running.written == running.request.max_new_tokens:
            reason = "length"
        elif running.position == running.bucket.capacity:
            reason = "capacity"
        if reason is not None:
            self._release(running)
        asked = running.request.logprobs
        logprobs = None if asked is None else top_logprobs(logits, running.last, asked)
        guessed = running.last == guess
        now = time.perf_counter()
        self._events.append(TokenWritten(running.handle, running.last, reason, now, logprobs, proposed, guessed))

    def _call(self, bucket: BucketInfo, entry: str, *arguments: NDArray[np.int32]) -> tuple[Any, ...]:
        table = self._places[bucket.capacity].slots.table
        try:
            return self._runner.call(bucket, entry, *arguments, *(() if table is None else (table,)))
        except BaseException:
            # The cache is gone, and with it what the others had in it.
            for running in [running for running in self._running.values() if running.bucket is bucket]:
                self._events.append(RequestLost(running.handle, _CALL_FAILED))
                self._release(running)
            raise


def _piece(ids: NDArray[np.int32], start: int, size: int) -> NDArray[np.int32]:
    """A piece of a row as [1, size], with zeros behind its end."""
    piece = np.zeros((1, size), np.int32)
    part = ids[start : start + size]
    piece[0, : len(part)] = part
    return piece


def _row(slot: int, offset: int, length: int) -> tuple[NDArray[np.int32], ...]:
    return tuple(np.array([number], np.int32) for number in (slot, offset, length))
