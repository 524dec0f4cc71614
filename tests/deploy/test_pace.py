"""Which calls read a prompt within a bound of seconds, and whose turn it is."""

import pytest

from iceformer.deploy.manifest import BucketInfo, CacheInfo
from iceformer.deploy.pace import Pace
from iceformer.deploy.turns import Turns


def pace(bound: float | None, query_block: int = 128, chunk: int = 512) -> Pace:
    plan = {"prompt": {"kind": "two_stage", "query_block": query_block}}
    return Pace(BucketInfo(1024, chunk, plan, "", (), CacheInfo((), (), 0), {}), bound)


def test_without_a_bound_a_step_is_one_whole_chunk() -> None:
    free = pace(None)
    free.note(512, 100.0)
    assert free.whole
    assert not free.fits(128, 0.0)


def test_chunks_are_whole_as_long_as_they_are_within_the_bound() -> None:
    bounded = pace(1.0)
    assert not bounded.whole, "nothing was timed"
    bounded.note(128, 0.24)
    assert bounded.whole, "four pieces take 0.96 s"
    bounded.note(512, 1.1)
    assert not bounded.whole
    for _ in range(8):
        bounded.note(512, 0.9)
    assert bounded.whole


def test_pieces_fill_the_bound() -> None:
    bounded = pace(1.0)
    assert not bounded.fits(128, 0.0), "nothing was timed"
    bounded.note(128, 0.3)
    assert [bounded.fits(128, spent) for spent in (0.0, 0.6, 0.71)] == [True, True, False]
    assert not bounded.whole


def test_where_pieces_split_query_blocks_time_decides_nothing() -> None:
    bounded = pace(1.0, query_block=256)
    bounded.note(128, 0.001)
    assert not bounded.whole


def test_a_chunk_without_smaller_pieces_stays_whole() -> None:
    assert pace(1e-9, chunk=200).whole


def test_turns() -> None:
    turns = Turns()
    present = {"a", "b"}
    for client in ("a", "b", "a"):
        turns.take(client, present)
    assert min("ab", key=turns.last) == "b"
    assert min("abc", key=turns.last) == "c"
    turns.take("b", {"b"})
    assert turns.last("a") == 0


@pytest.mark.parametrize("client", ["new", ""])
def test_who_never_had_a_turn_comes_first(client: str) -> None:
    turns = Turns()
    turns.take("old", {"old", client})
    assert turns.last(client) < turns.last("old")
