"""Several requests at once through the engine: each writes what it writes alone."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from iceformer.deploy.artifact import open_artifact
from iceformer.deploy.engine import Engine, PromptRead, Request, RequestLost, TokenWritten
from iceformer.deploy.manifest import ENTRIES, BucketInfo, CacheInfo
from iceformer.deploy.runner import Runner
from iceformer.deploy.sampling import Sampling
from iceformer.deploy.session import Session
from iceformer.deploy.slots import Slots

from ..few import few
from .conftest import VOCABULARY

LENGTHS, NEW = (100, 5, 70, 33), (9, 20, 12, 7)


def request(index: int) -> Request:
    ids = np.random.default_rng(index).integers(4, VOCABULARY, LENGTHS[index]).astype(np.int32)
    # Every other one draws: its draws are its own, whoever runs beside it.
    return Request(ids, NEW[index], Sampling(temperature=float(index % 2), seed=index))


@pytest.fixture
def engines(two_stage_artifact: Path, paged_artifact: Path) -> dict[str, Callable[[], Engine]]:
    return {
        "whole slots": lambda: Engine(Runner(open_artifact(two_stage_artifact))),
        "pages": lambda: Engine(Runner(open_artifact(paged_artifact))),
    }


def finish(engine: Engine, written: dict[int, list[int]], read: dict[int, list[int]] | None = None) -> None:
    """Steps until there is nothing to do."""
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, RequestLost)
            if isinstance(event, TokenWritten):
                written.setdefault(event.handle, []).append(event.id)
            elif read is not None:
                read.setdefault(event.handle, []).append(event.done)


def alone(session: Session, index: int) -> list[int]:
    asked = request(index)
    sampling = asked.sampling
    return session.generate(asked.ids, asked.max_new_tokens, sampling.temperature, sampling.seed).ids.tolist()


@pytest.mark.parametrize("memory", ["whole slots", "pages"])
def test_requests_at_once_write_what_each_writes_alone(
    engines: dict[str, Callable[[], Engine]], two_stage_session: Session, memory: str
) -> None:
    """Four requests in two slots, the last of which comes when the first are on their way."""
    engine = engines[memory]()
    handles = [engine.add(request(index)) for index in range(3)]
    written: dict[int, list[int]] = {}
    read: dict[int, list[int]] = {}
    for _ in range(3):
        for event in engine.step():
            if isinstance(event, PromptRead):
                read.setdefault(event.handle, []).append(event.done)
            elif isinstance(event, TokenWritten):
                written.setdefault(event.handle, []).append(event.id)
    handles.append(engine.add(request(3)))
    finish(engine, written, read)
    assert read == dict(zip(handles, ([32, 64, 96, 100], [5], [32, 64, 70], [32, 33]), strict=True))
    for index, handle in enumerate(handles):
        assert written[handle] == alone(two_stage_session, index)


def test_a_short_request_does_not_wait_for_a_long_prompt(engines: dict[str, Callable[[], Engine]]) -> None:
    engine = engines["whole slots"]()
    short, long = engine.add(request(1)), engine.add(request(0))
    events = [event for _ in range(4) for event in engine.step()]
    assert [event.done for event in events if isinstance(event, PromptRead) and event.handle == long] == [32, 64, 96]
    # One token with its prompt, then one in each step.
    assert sum(isinstance(event, TokenWritten) and event.handle == short for event in events) == 5


def test_clients_take_turns(engines: dict[str, Callable[[], Engine]], two_stage_session: Session) -> None:
    """One client asks three times before another asks at all: the other has the second slot, and every second piece."""
    engine = engines["whole slots"]()
    many = [engine.add(replace(request(index), client="many")) for index in (0, 3, 1)]
    one = engine.add(replace(request(2), client="one"))
    read: list[int] = []
    written: dict[int, list[int]] = {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, PromptRead):
                read.append(event.handle)
            elif isinstance(event, TokenWritten):
                written.setdefault(event.handle, []).append(event.id)
    assert read[:6] == [one, many[0]] * 3, "the shorter prompt first"
    for handle, index in zip([*many, one], (0, 3, 1, 2), strict=True):
        assert written[handle] == alone(two_stage_session, index)


def test_it_tells_how_long_a_prompt_took_and_how_many_have_a_slot(engines: dict[str, Callable[[], Engine]]) -> None:
    """The clock of a prompt starts with its first piece, not when it gets a slot, and runs while others write."""
    engine = engines["whole slots"]()
    start = time.perf_counter()
    handles = [engine.add(request(index)) for index in (0, 2, 1)]
    assert (engine.running, engine.waiting) == (0, 3)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    seconds: dict[int, list[float]] = {handle: [] for handle in handles}
    began: dict[int, float] = {}
    times: list[float] = []
    while engine.busy:
        before = time.perf_counter()
        for event in engine.step():
            if isinstance(event, TokenWritten):
                times.append(event.time)
                assert before <= event.time <= time.perf_counter()
            if isinstance(event, PromptRead):
                began.setdefault(event.handle, before)
                seconds[event.handle].append(event.seconds)
                assert 0 < event.seconds <= time.perf_counter() - start
    for handle in (handles[0], handles[2]):  # The shorter of the first two was begun in the step before.
        assert seconds[handle] == sorted(seconds[handle])
        assert seconds[handle][-1] <= time.perf_counter() - began[handle]
    assert times == sorted(times)
    assert (engine.running, engine.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("memory", "steps"),
    few(itertools.product(["whole slots", "pages"], [0, 2, 6]), [("whole slots", 0), ("pages", 2), ("whole slots", 6)]),
)
def test_a_cancelled_request_makes_room_and_changes_nobody(
    engines: dict[str, Callable[[], Engine]], two_stage_session: Session, memory: str, steps: int
) -> None:
    engine = engines[memory]()
    handles = [engine.add(request(index)) for index in range(4)]
    written: dict[int, list[int]] = {}
    for _ in range(steps):
        for event in engine.step():
            if isinstance(event, TokenWritten):
                written.setdefault(event.handle, []).append(event.id)
    engine.cancel(handles[0])
    engine.cancel(handles[0])
    engine.cancel(12345)
    before = list(written.get(handles[0], []))
    finish(engine, written)
    assert written.pop(handles[0], []) == before
    for index in (1, 2, 3):
        assert written[handles[index]] == alone(two_stage_session, index)


def test_logits_that_are_no_numbers_lose_one_request_and_no_other(
    engines: dict[str, Callable[[], Engine]], two_stage_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["whole slots"]()
    lost, kept = engine.add(request(1)), engine.add(request(3))
    call: Any = engine._runner.call
    written: dict[int, list[int]] = {}

    def spoil(bucket: BucketInfo, name: str, *arguments: Any) -> Any:
        results = call(bucket, name, *arguments)
        if name != "decode":
            return results
        logits = np.array(results[0])
        logits[engine._running[lost].slot] = np.nan
        return (logits,)

    while not written:
        written.update({event.handle: [event.id] for event in engine.step() if isinstance(event, TokenWritten)})
    assert set(written) == {lost}
    monkeypatch.setattr(engine._runner, "call", spoil)
    (event,) = [event for event in engine.step() if isinstance(event, RequestLost)]
    monkeypatch.undo()
    assert event.handle == lost
    assert "the largest logit is nan" in event.why
    finish(engine, written)
    assert len(written[lost]) <= 2
    assert written[kept] == alone(two_stage_session, 3)


def test_what_was_written_counts_for_the_penalties(engines: dict[str, Callable[[], Engine]]) -> None:
    """The bias makes one token the first, and the penalty makes it the last that is taken again."""
    engine = engines["whole slots"]()
    asked = request(1)
    token = int(np.setdiff1d(np.arange(4, VOCABULARY), asked.ids)[0])
    sampling = Sampling(logit_bias={token: 100.0}, repetition_penalty=1e6)
    handle = engine.add(replace(asked, max_new_tokens=5, sampling=sampling))
    written: dict[int, list[int]] = {}
    finish(engine, written)
    assert written[handle][0] == token
    assert token not in written[handle][1:]


def test_a_bias_of_an_unknown_token_is_refused_before_anything_runs(
    engines: dict[str, Callable[[], Engine]],
) -> None:
    engine = engines["whole slots"]()
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}, expected ids below {VOCABULARY}"):
        engine.add(replace(request(0), sampling=Sampling(logit_bias={VOCABULARY: 1.0})))
    assert not engine.busy


def test_a_failed_call_loses_its_buckets_requests_and_no_other(
    exact_artifact: Path, exact_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buckets of 64 and 128 tokens have a slot and a cache each. In the step that fails the smaller one has written
    already."""
    engine = Engine(Runner(open_artifact(exact_artifact)))
    short, long = engine.add(request(1)), engine.add(request(0))
    call: Any = engine._runner.call

    def fail(bucket: BucketInfo, name: str, *arguments: Any) -> Any:
        if (bucket.capacity, name) == (128, "decode"):
            raise MemoryError
        return call(bucket, name, *arguments)

    monkeypatch.setattr(engine._runner, "call", fail)
    events = [event for _ in range(4) for event in engine.step()]
    with pytest.raises(MemoryError):
        engine.step()
    monkeypatch.undo()
    later = engine.add(request(0))
    while engine.busy:
        events += engine.step()
    assert [event.handle for event in events if isinstance(event, RequestLost)] == [long]
    for handle, index in ((short, 1), (later, 0)):
        ids = [event.id for event in events if isinstance(event, TokenWritten) and event.handle == handle]
        assert ids == alone(exact_session, index)


def test_pages_have_one_owner_and_room_for_whole_chunks(exact_session: Session) -> None:
    bucket = replace(exact_session.info.buckets[0], capacity=1024, chunk=256, cache=CacheInfo((), (), 128))
    slots = Slots(bucket, 3)
    table: NDArray[np.int32] | None = slots.table
    assert table is not None
    counts = {10: 2, 257: 4, 1030: 8}
    owned = {slots.take(tokens): count for tokens, count in counts.items()}
    assert not slots.free
    pages = [table[slot, :count].tolist() for slot, count in owned.items()]
    assert len({page for of_slot in pages for page in of_slot}) == sum(counts.values())
    for slot in owned:
        slots.give_back(slot)
    assert sorted(slots.take(1024) for _ in range(3)) == [0, 1, 2]
    assert sorted(table.reshape(-1).tolist()) == list(range(24))


def test_an_artifact_with_an_entry_more_is_read(exact_session: Session, exact_artifact: Path) -> None:
    """A newer version may compile more; what is known is checked and used."""
    bucket = exact_session.info.buckets[0]
    more = replace(bucket, entries={**bucket.entries, "verify": bucket.entries["decode"]})
    artifact = open_artifact(exact_artifact)
    runner = Runner(replace(artifact, manifest=replace(artifact.manifest, buckets=(more,))))
    written: dict[int, list[int]] = {}
    engine = Engine(runner)
    handle = engine.add(request(1))
    finish(engine, written)
    assert written[handle] == alone(exact_session, 1)
    assert set(ENTRIES["decoder"]) < set(more.entries)
