"""The machine's measured peak of a matrix product. `python -m iceformer.evaluate.machine DTYPE` prints it.

A process of its own, because XLA's number of threads is settled when jax starts.
"""

import math
import sys
import time

import jax
import jax.numpy as jnp


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


if __name__ == "__main__":
    print(gemm_flops(sys.argv[1]))
