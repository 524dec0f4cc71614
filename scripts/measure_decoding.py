"""Measures what a new token costs after a long prompt, on artifacts and, with --gguf, in OpenVINO GenAI.

Every measurement is a process of its own, and engines take turns in every round. A time per token is that from the
first new token to the last, divided by their number. Bytes are those that exact attention reads for a token, by
formula: the weights, and keys and values up to that depth. The bandwidth is that of one sum over a large array on all
threads, measured in each round. Prints a table of medians and, last, a JSON list.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

FIRST_ID = 1000
"""Of random prompts, above the special tokens of common vocabularies."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", help="decoders that `iceformer compile` made")
    parser.add_argument("--depths", type=int, nargs="+", default=[2000, 8000], help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=33, help="new tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path, help="the same model for OpenVINO GenAI, dense and with XATTENTION")
    parser.add_argument("--openvino-python", default=sys.executable, help="a Python that has openvino-genai")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    depths, new = arguments.depths, arguments.new
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments.artifacts[0], depths[0], new)))
        return
    engines = [(str(path), "iceformer", sys.executable, path) for path in arguments.artifacts]
    if arguments.gguf:
        names = {"openvino_genai": "openvino", "openvino_genai, XATTENTION": "xattention"}
        engines += [(name, worker, arguments.openvino_python, arguments.gguf) for name, worker in names.items()]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    bandwidths = []
    calls = [(engine, depth) for _ in range(arguments.rounds) for depth in depths for engine in engines]
    for (name, worker, python, path), depth in track(calls, "decoding", console=Console(stderr=True)):
        if (name, worker, python, path) == engines[0]:
            bandwidths.append(read_bandwidth())
        command = [python, __file__, str(path), "--worker", worker, "--depths", str(depth), "--new", str(new)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured.setdefault((name, depth), []).append(json.loads(found.splitlines()[-1]))
    report(measured, statistics.median(bandwidths))


def report(measured: dict[tuple[str, int], list[dict[str, float]]], bandwidth: float) -> None:
    """Prints the medians."""
    table = Table(title=f"decoding, medians; the machine reads {bandwidth:.1f} GB/s")
    for column in ("engine", "depth", "ms a token", "spread", "tokens/s", "MB a token", "share of bandwidth"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    rows: list[dict[str, Any]] = []
    for (name, depth), results in measured.items():
        times = [result["ms"] for result in results]
        ms, read = statistics.median(times), results[0].get("bytes")
        rows.append({"engine": name, "depth": depth, "ms": times, "bytes": read, "bandwidth": bandwidth})
        share = f"{read / (ms * 1e6) / bandwidth:.0%}" if read else "-"
        spread = f"{(max(times) - min(times)) / ms:.0%}"
        cells = (f"{ms:.1f}", spread, f"{1e3 / ms:.1f}", f"{read / 1e6:.0f}" if read else "-", share)
        table.add_row(name, str(depth), *cells)
    Console().print(table)
    print(json.dumps(rows))


def prompt(depth: int) -> np.ndarray:
    """Random ids, the same for every engine."""
    return np.random.default_rng(0).integers(FIRST_ID, 30000, depth)


def decode_in_iceformer(artifact: Path, depth: int, new: int) -> dict[str, float]:
    """Milliseconds per token and bytes read by it, after one generation that warms up."""
    import iceformer

    with iceformer.load(artifact) as session:
        times: list[float] = []
        for _ in range(2):
            times = [time.perf_counter() for _ in session.generate(prompt(depth), max_new_tokens=new, stream=True)]
        bucket = next(bucket for bucket in session.info.buckets if bucket.capacity >= depth + new)
        cache = sum(layer[name].size_in_bytes for layer in bucket.cache.layers for name in ("key", "value"))
        milliseconds = (times[-1] - times[0]) / (len(times) - 1) * 1e3
        return {"ms": milliseconds, "bytes": session.info.weights.file.size + cache * depth / bucket.capacity}


def decode_in_openvino(sparse: bool) -> Callable[[Path, int, int], dict[str, float]]:
    """The same in OpenVINO GenAI, with its own defaults for the cache."""

    def decode(gguf: Path, depth: int, new: int) -> dict[str, float]:
        import openvino  # pyright: ignore[reportMissingImports]
        import openvino_genai as genai  # pyright: ignore[reportMissingImports]

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = 2
        if sparse:
            mode = genai.SparseAttentionMode.XATTENTION
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = genai.SparseAttentionConfig(mode=mode)
        threads = len(os.sched_getaffinity(0))
        pipeline = genai.LLMPipeline(str(gguf), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)
        ids = prompt(depth)[None].astype(np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        pipeline.generate(inputs, config)
        return {"ms": pipeline.generate(inputs, config).perf_metrics.get_tpot().mean}

    return decode


WORKERS = {
    "iceformer": decode_in_iceformer,
    "openvino": decode_in_openvino(sparse=False),
    "xattention": decode_in_openvino(sparse=True),
}


def read_bandwidth() -> float:
    """Gigabytes that all threads together read in a second, the best of five."""
    threads = len(os.sched_getaffinity(0))
    array = np.ones(100_000_000, np.float32)
    parts, seconds = np.array_split(array, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds) / 1e9


if __name__ == "__main__":
    main()
