"""Whether an engine's scores fit the memory."""

import pytest

from iceformer.evaluate import memory


def test_scores_are_counted_for_the_engines_that_write_them_out() -> None:
    assert memory.score_bytes("eager", "float32", 12, 16384) == 8 * 12 * 16384**2
    assert memory.score_bytes("sdpa", "float32", 12, 16384) == 0


def test_a_shortage_names_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000_000_000)
    assert memory.shortage(0) == memory.shortage(8_000_000_000) == ""
    assert memory.shortage(9_000_000_000) == "its scores take 9.0 GB, and 10.0 GB are available"


def test_available_memory_is_that_of_this_machine() -> None:
    assert 1e7 < memory.available_bytes() < 1e14
