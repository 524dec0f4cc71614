"""What machine this is, and its measured peaks.

`python -m iceformer.evaluate.machine DTYPE THREADS` prints the peaks as JSON.

A process of its own, because XLA's number of threads is settled when jax starts.
"""

import importlib.metadata
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..deploy.cpu import cpu_features, cpu_model

_PACKAGES = ("iceformer", "jax", "torch", "transformers", "openvino", "onnxruntime", "openvino-genai")


def machine_info() -> dict[str, Any]:
    """The processor's name and features, and versions of what is measured, where it is installed."""
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"cpu": cpu_model(), "features": sorted(cpu_features()), "versions": versions}


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


def read_bandwidth(threads: int, size: int = 100_000_000, rounds: int = 5) -> float:
    """Bytes a second that threads read together when each sums its part of a float32 array, the best of some rounds."""
    array = np.ones(size, np.float32)
    parts = np.array_split(array, threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best


if __name__ == "__main__":
    print(json.dumps({"gemm_flops": gemm_flops(sys.argv[1]), "read_bandwidth": read_bandwidth(int(sys.argv[2]))}))
