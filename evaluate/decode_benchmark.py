"""How long a new token takes after a long prompt, engine beside engine.

The rules are those of `benchmark.py`: the same model, ids and threads, processes of their own that take turns. Weights
and KV cache of ours have the formats that are asked for; peers have their own, and what each reads is counted.
"""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..attention import DecodeSelection, Exact, Plan, TwoStage
from ..convert.convert import convert_checkpoint
from ..deploy.compile import compile as compile_checkpoint
from .benchmark import check_engines, measure_length, output_path, start_or_resume
from .benchmark_result import Benchmark
from .benchmark_retention import Retention
from .decode_bytes import DecoderSizes, cache_bytes, file_bytes, our_cache_bytes, weight_bytes
from .decode_engines import DECODE_ENGINES, GENAI, OURS, DecodeJob, written_tokens
from .processes import Job, Report
from .shapes import ModelShape, write_random_model

_CHUNK = 2048
_CONTEXT = 131072
_LEAST_NEW_TOKENS = 3
_GENAI_SCALES = 8
"""Bytes beside a key or value in OpenVINO's 8-bit cache: a float32 scale and zero point."""


@dataclass(frozen=True)
class DecodeOptions:
    """What is decoded, and in which formats.

    Attributes:
        batch: requests that decode together.
        new_tokens: of each request in a run, at least 3.
        weights: of our engines, "same", "bfloat16", "int8" or "int4", as `iceformer.compile` takes it.
        kv_dtype: of our engines, "same" or "int8".
        budget: keys of the engine `selection`, and of two-stage attention in prompts.
    """

    batch: int = 1
    new_tokens: int = 32
    weights: str = "same"
    kv_dtype: str = "same"
    budget: int = 1024

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")
        if self.new_tokens < _LEAST_NEW_TOKENS:
            raise ValueError(f"new_tokens is {self.new_tokens}, expected at least {_LEAST_NEW_TOKENS}")


@dataclass(frozen=True)
class Peers:
    """Where engines of others are.

    Attributes:
        gguf: the same model, for OpenVINO GenAI and llama.cpp.
        openvino_python: interpreter that has openvino-genai, this one if not given.
        llama_bench: llama.cpp's benchmark, looked for on PATH if not given.
    """

    gguf: Path | None = None
    openvino_python: str | None = None
    llama_bench: str | None = None

    def check(self, engines: Sequence[str]) -> None:
        """Raises ValueError, FileNotFoundError or ModuleNotFoundError for what an engine lacks."""
        for engine in engines:
            if engine not in (*GENAI, "llama_cpp"):
                continue
            if self.gguf is None:
                raise ValueError(f"engine {engine} needs the same model as a GGUF file: give --gguf FILE")
            if not self.gguf.is_file():
                raise FileNotFoundError(f"{self.gguf} is not a file, expected the model as a GGUF file")
            if engine in GENAI and not self.openvino_python and importlib.util.find_spec("openvino_genai") is None:
                raise ModuleNotFoundError(
                    f"engine {engine} needs openvino-genai: install it, or give --openvino-python PYTHON"
                )


def run_decode_benchmark(
    work: Path,
    *,
    model: Path | None = None,
    shape: ModelShape | None = None,
    lengths: Sequence[int] = (4096, 16384),
    engines: Sequence[str] = ("exact", "selection", "sdpa"),
    options: DecodeOptions | None = None,
    peers: Peers | None = None,
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
        lengths: depths, in tokens of the prompt.
        engines: some of `DECODE_ENGINES`.
        options: what is decoded, `DecodeOptions()` if not given.
        peers: where engines of others are.
        dtype: "float32" or "bfloat16", of our engines and of sdpa.
        rounds: timed runs of each engine at each depth, at least 3.
        threads: of every engine, all that this process may use if not given.
        report: called with a line of text at each step.

    Raises:
        FileNotFoundError, ModuleNotFoundError: an engine's file or package is not there.
        ValueError: an unknown engine, a depth of no tokens, fewer than 3 rounds, or a folder that holds another run.
    """
    options, peers = options or DecodeOptions(), peers or Peers()
    threads = threads or len(os.sched_getaffinity(0))
    check_engines(engines, DECODE_ENGINES, rounds)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"depths are {list(lengths)}, expected some of at least 1 token")
    peers.check(engines)
    settings = {
        "mode": "decode",
        "model": str(model) if model else asdict(shape or ModelShape()),
        "gguf": str(peers.gguf) if peers.gguf else None,
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        **asdict(options),
    }
    work.mkdir(parents=True, exist_ok=True)
    source = model or work / "model"
    if not source.exists() and not model:
        report("writing random weights")
        write_random_model(source, shape or ModelShape(), max(_CONTEXT, *lengths), dtype)
    config = json.loads((source / "config.json").read_text())
    result = start_or_resume(work, settings, 0, report)
    result.retention = Retention(missing="--decode measures speed only")
    llama_bench = shutil.which(peers.llama_bench or "llama-bench")

    def prepare(engine: str, length: int) -> Job:
        form = work / f"{engine}-{length}" if engine in OURS else source
        if engine in OURS and not form.exists():
            report(f"{length} tokens: compiling {engine}")
            compile_engine(
                engine, source, work / "checkpoint", form, length=length, dtype=dtype, options=options, rounds=rounds
            )
        return DecodeJob(
            engine=engine,
            length=length,
            dtype=dtype,
            threads=threads,
            output=str(output_path(work, engine, length)),
            token_bytes=token_bytes(engine, config, length, dtype, options, peers.gguf),
            vocab=config["vocab_size"],
            new_tokens=options.new_tokens,
            rounds=rounds,
            batch=options.batch,
            form=str(form),
            gguf=str(peers.gguf or ""),
            python=peers.openvino_python or sys.executable,
            llama_bench=llama_bench or "",
        )

    unsupported = _unsupported(options.batch, llama_bench, peers)
    for length in lengths:
        measure_length(work, result, length, engines, prepare, unsupported, report)
    result.save(work / "benchmark.json")
    return result


def compile_engine(
    engine: str,
    source: Path,
    checkpoint: Path,
    artifact: Path,
    *,
    length: int,
    dtype: str,
    options: DecodeOptions,
    rounds: int,
) -> None:
    """Writes the artifact of one of our engines.

    Args:
        engine: one of `OURS`.
        source: Hugging Face folder.
        checkpoint: its conversion, made if it is not there.
        artifact: the folder to write, which must not exist.
        length: of the prompt, in tokens.
        dtype: "float32" or "bfloat16".
        options: of the benchmark.
        rounds: of the benchmark.
    """
    if not checkpoint.exists():
        convert_checkpoint(source, checkpoint)
    chunk = min(_CHUNK, length)
    needed = length + written_tokens(options.new_tokens, rounds, options.batch, length)
    compile_checkpoint(
        checkpoint,
        artifact,
        buckets=(-(-needed // chunk) * chunk,),
        attention=Plan(
            prompt=Exact() if engine == "exact" else TwoStage(budget=options.budget),
            decode=DecodeSelection(budget=options.budget) if engine == "selection" else Exact(),
        ),
        dtype=dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype,
        batch=options.batch,
        chunk=chunk,
    )


def token_bytes(
    engine: str, config: dict[str, Any], depth: int, dtype: str, options: DecodeOptions, gguf: Path | None
) -> int:
    """Bytes that an engine reads for a token of every request, by formula; 0 if the formulas do not fit the model."""
    sizes = DecoderSizes.of(config)
    if sizes is None:
        return 0
    if engine in OURS:
        kv = dtype if options.kv_dtype == "same" else options.kv_dtype
        selection = DecodeSelection(budget=options.budget) if engine == "selection" else None
        cache = our_cache_bytes(sizes, depth, kv, selection)
        return weight_bytes(sizes, dtype, options.weights) + options.batch * cache
    if engine == "sdpa":
        return weight_bytes(sizes, dtype, "same") + options.batch * cache_bytes(sizes, depth, dtype)
    assert gguf, "checked before"
    weights = file_bytes(sizes, gguf.stat().st_size)
    if engine in GENAI:
        return weights + options.batch * cache_bytes(sizes, depth, "int8", _GENAI_SCALES)
    return weights + cache_bytes(sizes, depth, "float16")


def _unsupported(batch: int, llama_bench: str | None, peers: Peers) -> dict[str, str]:
    """Reasons not to start an engine."""
    reasons = {}
    if llama_bench is None:
        given = peers.llama_bench
        reasons["llama_cpp"] = (
            f"{given} is not an executable" if given else "llama-bench is not on PATH (--llama-bench)"
        )
    if batch > 1:
        reasons["llama_cpp"] = f"its benchmark runs one request, and the batch is {batch}"
    return reasons
