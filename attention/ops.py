"""The matrix products that attention is made of: 2-D, accumulated and returned in float32.

XLA on CPU reaches its fast kernels for bfloat16 inputs only with a float32 result, and runs 2-D products in a loop
faster than one batched product that writes a large buffer.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """a @ b in float32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def matmul_transposed(a: Float[Array, "m k"], b: Float[Array, "n k"]) -> Float[Array, "m n"]:
    """a @ b.T in float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def transposed_matmul(a: Float[Array, "k m"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """a.T @ b in float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def check_logit_options(scale: float | None, softcap: float | None) -> None:
    """ValueError unless the scale of logits is a finite number, and the cap one above 0; None stands for neither."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number, or None for 1 / sqrt(head_dim)")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, expected a finite number above 0, or None for no cap")


def cap(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """`softcap * tanh(logits / softcap)`, as Gemma 2 caps its logits; unchanged without a cap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
