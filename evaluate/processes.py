"""Engines in processes of their own, so that the memory of each is its own and they can be timed in turn.

The child's side is `serve` of `serving.py`, the parent's side is `time_in_turn`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, ClassVar

import numpy as np

from .memory import shortage

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine's process does; subclasses add what the engine needs to know.

    Attributes:
        module: the module that is run with the job as JSON.
        engine: the engine's name.
        length: tokens.
        dtype: "float32" or "bfloat16".
        threads: of the engine.
        output: .npy file for the result of the run that warms up.
        score_bytes: of the [heads, n, n] arrays that the engine holds at a time.
        token_bytes: that the engine reads for a new token, by formula; 0 if that is not known.
        seed: of the random input.
    """

    module: ClassVar[str]

    engine: str
    length: int
    dtype: str
    threads: int
    output: str
    score_bytes: int = 0
    token_bytes: int = 0
    seed: int = 0

    @property
    def command(self) -> list[str]:
        """What starts the process; the job as JSON follows it."""
        return [sys.executable, "-m", self.module]


@dataclass(frozen=True)
class Timing:
    """What one engine took at one length.

    Attributes:
        engine: its name.
        length: in tokens.
        seconds: of each round.
        peak_bytes: the process's largest resident memory.
        difference: largest difference of its output from that of the engine `exact`, in standard deviations of the
            latter; None if there is nothing to compare with.
        busy: share of the processors that something else used while the engines stood still, before the first round.
        skipped: why it was not measured; empty if it was.
        token_bytes: that it reads for a new token, by formula; 0 if that is not known.
    """

    engine: str
    length: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    difference: float | None = None
    busy: float = 0.0
    skipped: str = ""
    token_bytes: int = 0

    @property
    def median(self) -> float:
        """Median seconds, NaN if it was skipped."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """Longest less shortest seconds, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.seconds else float("nan")

    def compared(self, difference: float | None) -> "Timing":
        """The same with the difference of its output."""
        return replace(self, difference=difference)


def time_in_turn(jobs: Sequence[Job], unsupported: Mapping[str, str], rounds: int, report: Report) -> list[Timing]:
    """Starts the engines one after the other, then times them in turn, so that a drifting machine drifts for all alike.

    Args:
        jobs: one for each engine.
        unsupported: reasons not to start an engine, by its name.
        rounds: timed runs of each engine.
        report: called with a line of text at each step.

    Returns:
        A timing for each job; one that could not run says why.
    """
    timings: list[Timing] = []
    with ExitStack() as stack:
        processes: list[EngineProcess] = []
        for job in jobs:
            reason = unsupported.get(job.engine) or shortage(job.score_bytes)
            if reason:
                timings.append(Timing(job.engine, job.length, skipped=reason))
                continue
            report(f"{job.length} tokens: warming up {job.engine}")
            processes.append(stack.enter_context(EngineProcess(job)))
        busy = busy_share()
        for number in range(rounds):
            for index, process in enumerate(processes):
                rest = _remaining(processes, index, rounds - number)
                report(f"{process.job.length} tokens: round {number + 1} of {rounds}, {process.job.engine}{rest}")
                process.run()
        return timings + [replace(process.timing(), busy=busy) for process in processes]


def _remaining(processes: Sequence["EngineProcess"], index: int, rounds: int) -> str:
    """What the rounds that are left will take, once the first is over."""
    if not all(process.seconds or process.failure for process in processes):
        return ""
    expected = [statistics.median(process.seconds) if process.seconds else 0.0 for process in processes]
    seconds = sum(expected) * rounds - sum(expected[:index])
    return f"; about {seconds:.0f} s to go" if seconds < 120 else f"; about {seconds / 60:.0f} min to go"


class EngineProcess:
    """An engine's process: ready once entered, idle between runs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seconds: list[float] = []
        self.failure = ""
        self._log = TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> "EngineProcess":
        self._process = subprocess.Popen(
            [*self.job.command, json.dumps(asdict(self.job))],
            env=environment(self.job.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                stream.close()

    def run(self) -> None:
        """Times one run; does nothing if the engine has failed before."""
        if self.failure:
            return
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.seconds += [answer["seconds"] for answer in [self._read()] if answer]

    def timing(self) -> Timing:
        """Ends the process and gives what was measured."""
        answer: dict[str, float] = {}
        if not self.failure:
            assert self._process.stdin
            self._process.stdin.close()
            answer = self._read()
        if self.failure:
            return Timing(self.job.engine, self.job.length, skipped=self.failure)
        return Timing(
            self.job.engine,
            self.job.length,
            tuple(self.seconds),
            int(answer["peak_bytes"]),
            token_bytes=self.job.token_bytes,
        )

    def _read(self) -> dict[str, float]:
        """The process's next answer; empty, with the failure noted, if it has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self.failure = failure(self._process.wait(), self._log)
        return {}


def busy_share(seconds: float = 1.0) -> float:
    """The share of the processors that is in use over a while in which this process sleeps."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and of these idle or waiting for a disk

    before = ticks()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def run_module(module: str, *arguments: str, threads: int) -> str:
    """Runs a module of the package in a process of its own and gives what it printed.

    Raises:
        ValueError: it failed; the message ends with the last line of its stderr.
    """
    with TemporaryFile("w+") as log:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(f"{module} {failure(done.returncode, log)}")
    return done.stdout


def environment(threads: int) -> dict[str, str]:
    """This process's environment with the number of threads that XLA and OpenMP are to use.

    Threads of OpenMP (torch) sleep while they wait: spinning, they take the processors from the engine whose turn is
    next, and with any other work on the machine a barrier of theirs costs more than what it waits for.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}


def failure(code: int, log: IO[str]) -> str:
    """How a process ended, from its exit code and what it wrote to stderr."""
    if code < 0:
        return f"was killed by signal {-code} (out of memory?)"
    log.seek(0)
    last = (log.read().strip().splitlines() or ["no message"])[-1]
    return f"ended with code {code}: {last}"


def difference(reference: Path, output: Path) -> float | None:
    """The largest difference of one output from another, in standard deviations of the latter; None if one is missing.

    Raises:
        ValueError: the two have not the same shape.
    """
    if not (reference.exists() and output.exists()):
        return None
    expected, found = np.load(reference), np.load(output)
    if expected.shape != found.shape:
        raise ValueError(f"{output} has shape {found.shape}, expected that of {reference}, {expected.shape}")
    return float(np.max(np.abs(found - expected)) / np.std(expected))
