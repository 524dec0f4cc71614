"""How long a prompt takes, engine beside engine: the same weights, tokens, threads and dtype, in turn, in one run.

Every engine is a process of its own (see `processes.py`), loaded and warmed up before any is timed. Rounds go through
all of them; what is compared is medians. What the timed attention keeps of a model's answers is measured in the same
run (see `benchmark_retention.py`), and so is how far every engine's logits are from those of exact attention.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..attention import TwoStage, attention_to_dict
from .benchmark_result import Benchmark
from .benchmark_retention import Retention, measure_retention
from .engines import ENGINES, UNSUPPORTED, PrefillJob
from .iceformer_engines import OURS, compile_engine
from .machine import machine_info
from .memory import score_bytes
from .processes import Job, Report, difference, run_module, time_in_turn
from .shapes import ModelShape, write_random_model

_CONTEXT = 131072
"""Positions of a random model, so that a later run in the same folder can take longer prompts."""
_EXPORTED = ("openvino", "onnxruntime")
_PACKAGES = {
    "sdpa": ("torch", "transformers"),
    "eager": ("torch", "transformers"),
    "openvino": ("openvino", "torch", "transformers"),
    "onnxruntime": ("onnxruntime", "onnxscript", "torch", "transformers"),
}


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
    retention: bool = True,
    retention_records: int = 2,
    retention_tokens: int = 16384,
    report: Report = lambda line: None,
) -> Benchmark:
    """Measures, and keeps what is measured in `work/benchmark.json`; a run that was interrupted goes on from there.

    A length whose engines have all been measured is not measured again. Where an engine is new, the length is measured
    again with all of its engines, because only engines that took turns can be compared.

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
        retention: measure what `attention` keeps of the demo model's answers; takes minutes.
        retention_records: records of each kind.
        retention_tokens: of each record, at most and nearly.
        report: called with a line of text at each step.

    Raises:
        ModuleNotFoundError: an engine that is not installed.
        ValueError: an unknown engine, fewer than 3 rounds, or a folder that holds another run.
    """
    attention = attention or TwoStage(budget=1024)
    threads = threads or len(os.sched_getaffinity(0))
    check_engines(engines, tuple(ENGINES), rounds)
    settings = {
        "mode": "prefill",
        "model": str(model) if model else asdict(shape or ModelShape()),
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "attention": attention_to_dict(attention),
    }
    work.mkdir(parents=True, exist_ok=True)
    source = model or work / "model"
    if not source.exists() and not model:
        report("writing random weights")
        write_random_model(source, shape or ModelShape(), max(_CONTEXT, *lengths), dtype)
    sizes = _sizes(source)
    result = start_or_resume(work, settings, sizes.dense_flops_per_token, report)
    result.retention = retention_of(
        work, result, attention, retention, records=retention_records, tokens=retention_tokens, report=report
    )

    unsupported = {engine: reason for (engine, kind), reason in UNSUPPORTED.items() if kind == dtype}

    def prepare(engine: str, length: int) -> Job:
        form = work / (f"{engine}-model" if engine in _EXPORTED else f"{engine}-{length}")
        if engine in OURS and not form.exists():
            report(f"{length} tokens: compiling {engine}")
            checkpoint = work / "checkpoint"
            compile_engine(engine, source, checkpoint, form, length=length, attention=attention, dtype=dtype)
        if engine in _EXPORTED and not form.exists() and engine not in unsupported:
            report(f"exporting the model for {engine}")
            try:
                run_module("iceformer.evaluate.exports", engine, str(source), str(form), dtype, threads=threads)
            except ValueError as error:  # a model that the engine cannot take must not end the run of the others
                unsupported[engine] = str(error)
        return PrefillJob(
            engine=engine,
            length=length,
            dtype=dtype,
            threads=threads,
            output=str(output_path(work, engine, length)),
            score_bytes=score_bytes(engine, dtype, sizes.heads, length),
            source=str(source),
            form=str(form),
        )

    for length in lengths:
        measure_length(work, result, length, engines, prepare, unsupported, report)
    result.save(work / "benchmark.json")
    return result


def check_engines(engines: Sequence[str], known: Sequence[str], rounds: int) -> None:
    """Raises ValueError for an unknown engine or too few rounds, ModuleNotFoundError for one not installed."""
    if not engines or set(engines) - set(known):
        raise ValueError(f"engines are {list(engines)}, expected some of: {', '.join(known)}")
    if rounds < 3:
        raise ValueError(f"rounds is {rounds}, expected at least 3, of which the median is taken")
    for engine in engines:
        missing = [package for package in _PACKAGES.get(engine, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise ModuleNotFoundError(f"engine {engine} needs {', '.join(missing)}: pip install 'iceformer[bench]'")


def start_or_resume(work: Path, settings: dict[str, Any], dense_flops_per_token: int, report: Report) -> Benchmark:
    """The result in the folder, or a new one with the machine's figures.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path = work / "benchmark.json"
    if path.exists():
        return Benchmark.load(path, settings)
    report("measuring the machine's peaks")
    threads = settings["threads"]
    peaks = json.loads(run_module("iceformer.evaluate.machine", settings["dtype"], str(threads), threads=threads))
    return Benchmark(
        settings, machine_info(), peaks["gemm_flops"], dense_flops_per_token, read_bandwidth=peaks["read_bandwidth"]
    )


def retention_of(
    work: Path, result: Benchmark, attention: TwoStage, wanted: bool, *, records: int, tokens: int, report: Report
) -> Retention:
    """What stands beside the speeds: measured, taken from the folder, or a reason why there is nothing."""
    if not wanted:
        return result.retention if result.retention.kept else Retention(missing="not asked for (--retention)")

    def save(known: Retention) -> None:
        result.retention = known
        result.save(work / "benchmark.json")

    return measure_retention(
        work / "retention",
        attention,
        result.settings["dtype"],
        records=records,
        tokens=tokens,
        earlier=result.retention,
        report=report,
        save=save,
    )


def measure_length(
    work: Path,
    result: Benchmark,
    length: int,
    engines: Sequence[str],
    prepare: Callable[[str, int], Job],
    unsupported: Mapping[str, str],
    report: Report,
) -> None:
    """Times the engines at one length, unless the folder has them all, and saves.

    Args:
        work: the folder.
        result: takes the timings.
        length: in tokens.
        engines: their names.
        prepare: makes what an engine needs and gives its `Job`, from its name and the length.
        unsupported: reasons not to start an engine, by its name; read after `prepare`.
        report: called with a line of text at each step.
    """
    done = [timing.engine for timing in result.timings if timing.length == length]
    if set(engines) <= set(done):
        return
    jobs = [prepare(engine, length) for engine in dict.fromkeys([*done, *engines])]
    (work / "outputs").mkdir(exist_ok=True)
    for job in jobs:
        Path(job.output).unlink(missing_ok=True)
    timings = time_in_turn(jobs, unsupported, result.settings["rounds"], report)
    outputs = {job.engine: Path(job.output) for job in jobs}
    reference = output_path(work, "exact", length)
    result.replace_length(
        length, [timing.compared(difference(reference, outputs[timing.engine])) for timing in timings]
    )
    result.save(work / "benchmark.json")


def output_path(work: Path, engine: str, length: int) -> Path:
    """Where an engine's output is kept."""
    return work / "outputs" / f"{engine}-{length}.npy"


def _sizes(source: Path) -> ModelShape:
    """The sizes that count, from a model's config."""
    config = json.loads((source / "config.json").read_text())
    heads = config["num_attention_heads"]
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        mlp=config["intermediate_size"],
        vocab=config["vocab_size"],
    )
