"""Whether an installed iceformer has its native kernels, and whether these agree with numpy on every instruction set.

Needs nothing but what the package itself needs. The argument is the version that the kernels must have.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import iceformer
from iceformer import kernels

Heads = np.ndarray
"""[rows, heads, tokens, head_dim]"""


def check(version: str) -> str:
    """What was found, in words.

    Raises:
        SystemExit: the kernels are missing, of another version, or wrong.
    """
    if Path(iceformer.__file__).is_relative_to(Path(__file__).parents[1]):
        raise SystemExit(f"{iceformer.__file__} is the checkout's, expected that of an installed wheel")
    if kernels.version() != version:
        raise SystemExit(f"the native kernels' version is {kernels.version()}, expected {version}, that of the sources")
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, 100, 32)).astype(np.float32) for _ in range(3))
    expected = naive_attention(query, key, value)
    for name in kernels.instruction_sets():
        with kernels.using(name):
            error = np.abs(native_attention(query, key, value) - expected).max()
        if not error < 1e-5:
            raise SystemExit(f"attention by the kernels for {name} differs from numpy's by {error:.2g}, expected 1e-5")
    names = ", ".join(kernels.instruction_sets())
    return f"the kernels choose {kernels.instruction_set()}; attention agrees with numpy on {names}"


def naive_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Causal attention in float64."""
    logits = np.einsum("bhqd,bhkd->bhqk", query.astype(float), key) / query.shape[3] ** 0.5
    logits = np.where(np.tri(query.shape[2], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=3, keepdims=True))
    return weights / weights.sum(axis=3, keepdims=True) @ value


def native_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """The same by the custom call, which attention/custom_calls.py makes for models."""
    none, table = jnp.zeros((0, 0, 0), jnp.float32), jnp.zeros((0, 0), jnp.int32)
    slot, offset, length = (jnp.array([x], jnp.int32) for x in (0, 0, key.shape[2]))
    results = (jax.ShapeDtypeStruct(query.shape, jnp.float32), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32))
    output, _ = jax.ffi.ffi_call(kernels.EXACT, results)(
        *(query, key, value, none, none, slot, offset, length, table),
        query_block=np.int64(64),
        window=np.int64(0),
        causal=True,
        scale=np.float32(query.shape[3] ** -0.5),
        softcap=np.float32(0),
    )
    return np.asarray(output)


if __name__ == "__main__":
    print(check(sys.argv[1]))
