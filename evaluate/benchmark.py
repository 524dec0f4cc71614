"""How long a prompt takes, engine beside engine: the same weights, tokens, threads and dtype, in turn, in one run.

Every engine is a process of its own (see `engines.py`), loaded and warmed up before any is timed. Rounds go through all
of them, so that a machine whose speed drifts drifts for all alike; what is compared is medians.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import jax
import jax.numpy as jnp

from ..attention import Dense, TwoStage, attention_to_dict
from ..convert.convert import convert_checkpoint
from ..deploy.compile import compile as compile_checkpoint
from ..deploy.cpu import cpu_features, cpu_model
from ..model import llama
from .engines import ENGINES, Job
from .shapes import ModelShape, write_random_model

OURS = {"two_stage", "exact", "floor"}
Report = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """What one engine took at one length.

    Attributes:
        engine: its name.
        length: tokens of the prompt.
        seconds: of each round.
        peak_bytes: the process's largest resident memory.
        skipped: why it was not measured; empty if it was.
    """

    engine: str
    length: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    skipped: str = ""

    @property
    def median(self) -> float:
        """Median seconds, NaN if it was skipped."""
        return statistics.median(self.seconds) if self.seconds else math.nan


@dataclass
class Benchmark:
    """A run's settings and timings, as they stand in its JSON file.

    Attributes:
        settings: what was measured: shape or model, dtype, threads, attention, rounds.
        machine: processor and its features.
        gemm_flops: the machine's measured peak of a matrix product in the dtype, floating-point operations a second.
        dense_flops_per_token: operations of the model's linear layers.
        timings: one for each engine and length.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    gemm_flops: float
    dense_flops_per_token: int
    timings: list[Timing] = field(default_factory=list)

    def median(self, engine: str, length: int) -> float:
        """Median seconds of an engine at a length, NaN if it was not measured."""
        found = (timing.median for timing in self.timings if (timing.engine, timing.length) == (engine, length))
        return next(found, math.nan)

    def floor_share_of_peak(self, length: int) -> float:
        """What the dense layers reach of the machine's peak when attention is left out."""
        return self.dense_flops_per_token * length / self.median("floor", length) / self.gemm_flops

    def growth(self, engine: str, shorter: int, longer: int) -> float:
        """The exponent p of seconds ~ length^p between two lengths."""
        return math.log(self.median(engine, longer) / self.median(engine, shorter)) / math.log(longer / shorter)

    def save(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Benchmark":
        """Reads what `save` wrote."""
        content = json.loads(path.read_text())
        content["timings"] = [Timing(**{**t, "seconds": tuple(t["seconds"])}) for t in content["timings"]]
        return cls(**content)


def run_benchmark(
    work: Path,
    *,
    model: Path | None = None,
    shape: ModelShape | None = None,
    lengths: Sequence[int] = (4096, 16384),
    engines: Sequence[str] = ("two_stage", "exact", "floor", "sdpa"),
    attention: TwoStage | None = None,
    dtype: str = "float32",
    rounds: int = 3,
    threads: int | None = None,
    report: Report = lambda line: None,
) -> Benchmark:
    """Measures, and keeps what is measured in `work/benchmark.json`; a run that was interrupted goes on from there.

    Args:
        work: folder for model, artifacts and result.
        model: a Hugging Face folder; if not given, random weights of `shape`.
        shape: sizes of the random model, `ModelShape()` if not given.
        lengths: of the prompt, in tokens.
        engines: keys of `ENGINES`.
        attention: of the engine `two_stage`.
        dtype: "float32" or "bfloat16", of every engine.
        rounds: timed prefills of each engine at each length, at least 3.
        threads: of every engine, all that this process may use if not given.
        report: called with a line of text at each step.

    Raises:
        ValueError: an unknown engine, fewer than 3 rounds, or a folder that holds another run.
    """
    attention = attention or TwoStage()
    threads = threads or len(os.sched_getaffinity(0))
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"engines are {list(engines)}, expected some of: {', '.join(ENGINES)}")
    if rounds < 3:
        raise ValueError(f"rounds is {rounds}, expected at least 3, of which the median is taken")
    shape = shape or ModelShape()
    settings = {
        "model": str(model) if model else asdict(shape),
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "attention": attention_to_dict(attention),
    }
    work.mkdir(parents=True, exist_ok=True)
    result = _resume(work / "benchmark.json", settings) or _start(settings, model, shape, dtype, report)
    source = model or write_random_model(work / "model", shape, max(lengths), dtype)
    done = {(timing.engine, timing.length) for timing in result.timings}
    for length in lengths:
        wanted = [engine for engine in engines if (engine, length) not in done]
        if not wanted:
            continue
        jobs = [Job(engine, str(source), str(work / f"{engine}-{length}"), length, dtype, threads) for engine in wanted]
        for job in jobs:
            if job.engine in OURS and not Path(job.artifact).exists():
                report(f"{length} tokens: compiling {job.engine}")
                _compile(work, source, job, attention)
        result.timings += _time(jobs, rounds, report)
        result.save(work / "benchmark.json")
    return result


def _resume(path: Path, settings: dict[str, Any]) -> Benchmark | None:
    if not path.exists():
        return None
    result = Benchmark.load(path)
    if result.settings != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} is a run with other settings, {result.settings}: give another folder, or remove it")
    return result


def _start(settings: dict[str, Any], model: Path | None, shape: ModelShape, dtype: str, report: Report) -> Benchmark:
    report("measuring the peak of a matrix product")
    if model:
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        shape = ModelShape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            mlp=config["intermediate_size"],
            vocab=config["vocab_size"],
        )
    machine = {"cpu": cpu_model(), "features": sorted(cpu_features())}
    return Benchmark(settings, machine, gemm_flops(dtype), shape.dense_flops_per_token)


def gemm_flops(dtype: str, size: int = 2048, rounds: int = 7) -> float:
    """Floating-point operations a second of a square matrix product with a float32 result, the best of some rounds."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _compile(work: Path, source: Path, job: Job, attention: TwoStage) -> None:
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        convert_checkpoint(source, checkpoint)
    with attention_left_out() if job.engine == "floor" else ExitStack():
        compile_checkpoint(
            checkpoint,
            job.artifact,
            buckets=(job.length,),
            attention=attention if job.engine == "two_stage" else Dense(),
            dtype=job.dtype,
            chunk=min(2048, job.length),
        )


@contextmanager
def attention_left_out() -> Iterator[None]:
    """Models traced inside have their values in place of attention, so that only the dense layers' work is left."""
    attend = llama.attend

    def values(config: Any, query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
        return jnp.repeat(value[:, :, : query.shape[2]], query.shape[1] // value.shape[1], axis=1)

    llama.attend = values
    try:
        yield
    finally:
        llama.attend = attend


def _time(jobs: Sequence[Job], rounds: int, report: Report) -> list[Timing]:
    """Starts the engines one after the other, then times them in turn."""
    with ExitStack() as stack:
        processes: list[EngineProcess] = []
        for job in jobs:
            report(f"{job.length} tokens: warming up {job.engine}")
            processes.append(stack.enter_context(EngineProcess(job)))
        for number in range(rounds):
            for process in processes:
                report(f"{process.job.length} tokens: round {number + 1} of {rounds}, {process.job.engine}")
                process.run()
        return [process.timing() for process in processes]


class EngineProcess:
    """An engine's process: ready once entered, idle between runs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._seconds: list[float] = []
        self._failure = ""
        self._log = TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> "EngineProcess":
        command = [sys.executable, "-m", "iceformer.evaluate.engines", json.dumps(asdict(self.job))]
        environment = os.environ | {"NPROC": str(self.job.threads), "OMP_NUM_THREADS": str(self.job.threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
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
        """Times one prefill; does nothing if the engine has failed before."""
        if self._failure:
            return
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self._seconds += [answer["seconds"] for answer in [self._read()] if answer]

    def timing(self) -> Timing:
        """Ends the process and gives what was measured."""
        if self._failure:
            return Timing(self.job.engine, self.job.length, skipped=self._failure)
        assert self._process.stdin
        self._process.stdin.close()
        answer = self._read()
        return Timing(self.job.engine, self.job.length, tuple(self._seconds), int(answer.get("peak_bytes", 0)))

    def _read(self) -> dict[str, float]:
        """The process's next answer; empty, with the failure noted, if it has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["no message"])[-1]
        self._failure = f"ended with code {code}: {last}" if code >= 0 else f"killed by signal {-code} (out of memory?)"
        return {}
