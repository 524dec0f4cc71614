"""Attention by the native kernels: the same functions as `exact_attention` and `two_stage_attention`, as one custom
call each. What they compute is defined by those, and tested against them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8

from .. import kernels
from .blocks import next_power_of_two, pad_axis
from .config import TwoStage, method_of
from .methods import LowRank

_ROWS = 128
"""Query rows, those of all heads that share a KV head, that the kernel for exact attention aims at in a task."""

Attended = tuple[
    Float[Array, "batch query_heads queries value_dim"],
    Float32[Array, "batch query_heads queries"],
]
"""Output, and the log-sum-exp of the logits that each query attended to."""


def available(query: Array, key: Array, value: Array) -> bool:
    """Whether the kernels are there, not switched off, and made for these arrays."""
    same_type = query.dtype == key.dtype == value.dtype
    return same_type and query.dtype in (jnp.float32, jnp.bfloat16) and query.shape[3] % 2 == 0 and kernels.enabled()


def exact(
    query: Float[Array, "batch query_heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    *,
    offset: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Attended:
    """Exact attention, to the keys of a sliding window if there is one."""
    group, queries = query.shape[1] // key.shape[1], query.shape[2]
    block = max(16, 1 << max(0, (_ROWS // group).bit_length() - 1))
    return _call(
        kernels.EXACT,
        (query, key, value, offset, lengths),
        query_block=min(block, next_power_of_two(queries)),
        window=window or 0,
        causal=causal,
        scale=scale,
        softcap=softcap,
    )


def two_stage(
    config: TwoStage,
    query: Float[Array, "batch query_heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    projected: Int8[Array, "batch kv_heads keys rank"],
    projected_queries: Float32[Array, "heads blocks rows rank"],
    *,
    offset: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Attended:
    """Two-stage attention by the method `low_rank`, from keys and queries projected to its directions."""
    method = method_of(config)
    assert isinstance(method, LowRank)
    key, value, projected = (pad_axis(x, 2, config.key_block) for x in (key, value, projected))
    return _call(
        kernels.TWO_STAGE,
        (query, key, value, projected, projected_queries, offset, lengths),
        query_block=config.query_block,
        causal=causal,
        scale=scale,
        softcap=softcap,
        budget=config.budget,
        key_block=config.key_block,
        candidate_blocks=config.candidate_blocks,
        sink=config.sink,
        local=config.local,
        exact_keys=config.exact_keys,
        exact_last_block=config.exact_last_block,
        ranking_queries=method.ranking_count(projected_queries.shape[2]),
    )


def _call(target: str, arrays: tuple[Array, ...], *, scale: float, softcap: float | None, **options: int) -> Attended:
    query, value = arrays[0], arrays[2]
    results = (
        jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
    )
    integers = {name: x if isinstance(x, bool) else np.int64(x) for name, x in options.items()}
    output, lse = jax.ffi.ffi_call(target, results)(
        *arrays, scale=np.float32(scale), softcap=np.float32(softcap or 0.0), **integers
    )
    return output, lse
