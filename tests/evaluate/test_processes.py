"""Engines' processes: what happens to one that cannot start, fails, or is killed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from iceformer.evaluate.processes import Job, difference, run_module, time_in_turn

ENGINE = """
import json, os, signal, sys
job = json.loads(sys.argv[1])
import numpy as np
from iceformer.evaluate.serving import Engine, serve
runs = []
def run():
    runs.append(1)
    print("a library that prints")
    if job["engine"] == "fails" and len(runs) == 2:
        raise ValueError("no more")
    if job["engine"] == "measures":
        return 0.25
    if job["engine"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
serve(job["output"], lambda: Engine(run, lambda: np.arange(3, dtype=np.float32)))
"""


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Job]:
    (tmp_path / "small_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    @dataclass(frozen=True, kw_only=True)
    class SmallJob(Job):
        module: ClassVar[str] = "small_engine"

    return lambda engine: SmallJob(
        engine=engine, length=8, dtype="float32", threads=1, output=str(tmp_path / f"{engine}.npy")
    )


def test_an_engine_that_fails_does_not_end_the_others(make_job: Callable[[str], Job], tmp_path: Path) -> None:
    jobs = [make_job(engine) for engine in ("works", "measures", "fails", "killed", "unknown")]
    timings = time_in_turn(jobs, {"unknown": "it is not known here"}, 3, lambda step: None)
    by_name = {timing.engine: timing for timing in timings}
    assert len(by_name["works"].seconds) == 3
    assert by_name["works"].peak_bytes > 1e6
    assert by_name["measures"].seconds == (0.25, 0.25, 0.25), "an engine's own seconds are taken"
    assert by_name["fails"].skipped == "ended with code 1: ValueError: no more"
    assert by_name["killed"].skipped == "was killed by signal 9 (out of memory?)"
    assert by_name["unknown"].skipped == "it is not known here"
    np.testing.assert_array_equal(np.load(tmp_path / "works.npy"), np.arange(3))


def test_a_module_that_fails_is_an_error_with_its_last_line() -> None:
    with pytest.raises(ValueError, match=r"json\.tool ended with code .: .*nowhere"):
        run_module("json.tool", "nowhere", threads=1)
    assert "usage" in run_module("json.tool", "--help", threads=1)


def test_difference_is_in_standard_deviations(tmp_path: Path) -> None:
    reference, output = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(reference, np.array([0.0, 2.0, 4.0]))
    assert difference(reference, output) is None
    np.save(output, np.array([0.0, 2.0, 7.0]))
    assert difference(reference, output) == pytest.approx(3.0 / np.std([0.0, 2.0, 4.0]))
    np.save(output, np.zeros(2))
    with pytest.raises(ValueError, match=r"has shape \(2,\), expected that of .*\(3,\)"):
        difference(reference, output)
