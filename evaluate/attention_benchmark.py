"""How long attention alone takes, engine beside engine, over whole sequences of random queries, keys and values.

The rules are those of `benchmark.py`: the same arrays, threads and dtype, processes of their own that take turns.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..attention import TwoStage, attention_to_dict
from ..attention.shape import AttentionShape
from .attention_engines import ATTENTION_ENGINES, AttentionJob
from .benchmark import check_engines, measure_length, output_path, retention_of, start_or_resume
from .benchmark_result import Benchmark
from .benchmark_retention import Retention
from .memory import score_bytes
from .processes import Job, Report

_BIDIRECTIONAL = "the demo model, which gives the answers, is causal"


def run_attention_benchmark(
    work: Path,
    *,
    shape: AttentionShape | None = None,
    lengths: Sequence[int] = (4096, 16384),
    engines: Sequence[str] = ("two_stage", "exact", "sdpa"),
    attention: TwoStage | None = None,
    dtype: str = "float32",
    rounds: int = 3,
    threads: int | None = None,
    retention: bool = False,
    retention_records: int = 2,
    retention_tokens: int = 16384,
    report: Report = lambda line: None,
) -> Benchmark:
    """Measures, and keeps what is measured in `work/benchmark.json`; a run that was interrupted goes on from there.

    Args:
        work: folder for the result.
        shape: sizes of the attention layer, `AttentionShape()` if not given.
        lengths: queries, and as many keys, in tokens.
        engines: keys of `ATTENTION_ENGINES`.
        attention: of the engine `two_stage`.
        dtype: "float32" or "bfloat16", of queries, keys and values.
        rounds: timed calls of each engine at each length, at least 3.
        threads: of every engine, all that this process may use if not given.
        retention: measure what `attention` keeps of the demo model's answers; takes minutes. The model is causal.
        retention_records: records of each kind.
        retention_tokens: of each record, at most and nearly.
        report: called with a line of text at each step.

    Raises:
        ModuleNotFoundError: an engine that is not installed.
        ValueError: an unknown engine, fewer than 3 rounds, or a folder that holds another run.
    """
    attention, shape = attention or TwoStage(budget=1024), shape or AttentionShape()
    threads = threads or len(os.sched_getaffinity(0))
    check_engines(engines, tuple(ATTENTION_ENGINES), rounds)
    if retention and not shape.causal:
        raise ValueError(f"retention cannot be measured, {_BIDIRECTIONAL}: leave out --retention")
    options = attention_to_dict(attention)
    sizes = {"heads": shape.query_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "causal": shape.causal}
    settings = {
        "mode": "attention",
        "model": sizes,
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "attention": options,
    }
    work.mkdir(parents=True, exist_ok=True)
    result = start_or_resume(work, settings, 0, report)
    if shape.causal:
        result.retention = retention_of(
            work, result, attention, retention, records=retention_records, tokens=retention_tokens, report=report
        )
    else:
        result.retention = Retention(missing=_BIDIRECTIONAL)

    def prepare(engine: str, length: int) -> Job:
        return AttentionJob(
            engine=engine,
            length=length,
            dtype=dtype,
            threads=threads,
            output=str(output_path(work, engine, length)),
            score_bytes=score_bytes(engine, dtype, shape.query_heads, length),
            attention=options,
            **sizes,
        )

    for length in lengths:
        measure_length(work, result, length, engines, prepare, {}, report)
    result.save(work / "benchmark.json")
    return result
