"""Attention by the native kernels, as custom calls. The forms in XLA define what they compute; tests compare both."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from .. import kernels
from .blocks import next_power_of_two
from .keys import KeyView
from .logits import scale_of
from .methods import LowRank
from .methods.low_rank import PROJECTED_KEY
from .rows import Rows
from .strategy import Call

if TYPE_CHECKING:
    from .decode_selection import DecodeSelection
    from .two_stage import SelectingBlocks, TwoStage

_LANES = 128
"""Queries, of all heads that share a KV head, that the kernel for exact attention aims at in a task."""

WithLogSumExp = tuple[
    Float[Array, "rows query_heads queries value_dim"],
    Float32[Array, "rows query_heads queries"],
]
"""Output, and the log-sum-exp of the logits that each query attended to."""


def objection(call: Call) -> str | None:
    """Why the kernels are not made for these arrays, in words; None where they are."""
    if not kernels.enabled():
        return "the native kernels are not there, or switched off"
    query, keys = call.query, call.keys
    types = {str(x.dtype) for x in ((query,) if keys.key_scale is not None else (query, keys.key, keys.value))}
    if len(types) > 1 or not types <= {"float32", "bfloat16"}:
        return f"the kernels take float32 or bfloat16, the same for all, and these are {', '.join(sorted(types))}"
    return f"the kernels take an even head_dim, and this is {query.shape[3]}" if query.shape[3] % 2 else None


def exact(call: Call) -> WithLogSumExp:
    """Exact attention, to the keys of a sliding window if there is one."""
    query, keys, rows, mask, *_ = call
    group, queries = query.shape[1] // keys.kv_heads, query.shape[2]
    block = max(16, 1 << max(0, (_LANES // group).bit_length() - 1))
    return _call(
        kernels.EXACT,
        (query, *_stored(keys), *_places(rows, keys)),
        query_block=min(block, next_power_of_two(queries)),
        window=mask.window or 0,
        causal=mask.causal,
        scale=scale_of(mask, query.shape[3]),
        softcap=mask.softcap,
    )


def two_stage(
    config: "TwoStage",
    call: Call,
    projected_queries: Float32[Array, "heads blocks lanes rank"],
    offsets: Float32[Array, "*heads_blocks_lanes"],
    selecting: "SelectingBlocks",
) -> WithLogSumExp:
    """Two-stage attention by the method `low_rank`, from keys and queries projected to its directions.

    `offsets` is what these lack of each query's logits, before the scale; by mass only, else an empty array.
    """
    query, keys, rows, mask, *_ = call
    method = config.ranking
    assert isinstance(method, LowRank)
    return _call(
        kernels.TWO_STAGE,
        (
            *(query, *_stored(keys), keys.fields[PROJECTED_KEY]),
            *(projected_queries, offsets, jnp.stack(selecting, axis=1)),
            *_places(rows, keys),
        ),
        query_block=config.query_block,
        causal=mask.causal,
        scale=scale_of(mask, query.shape[3]),
        softcap=mask.softcap,
        budget=config.most_keys,
        key_block=config.key_block,
        candidate_blocks=config.candidate_blocks,
        sink=config.sink,
        local=config.local,
        ranking_queries=method.ranking_count(projected_queries.shape[2]),
        least=config.least_keys,
        mass=config.mass or 0.0,
    )


def choose(
    config: "DecodeSelection", call: Call, projected_queries: Float32[Array, "heads group rank"]
) -> tuple[Int32[Array, "heads most"], Int32[Array, " heads"]]:
    """The key blocks that each head attends to besides its neighbourhood, by the method `low_rank`, and how many."""
    heads = projected_queries.shape[0]
    results = (
        jax.ShapeDtypeStruct((heads, config.most_blocks), jnp.int32),
        jax.ShapeDtypeStruct((heads,), jnp.int32),
    )
    blocks, counts = jax.ffi.ffi_call(kernels.CHOOSE, results)(
        call.keys.fields[PROJECTED_KEY],
        projected_queries,
        *_places(call.rows, call.keys),
        scale=np.float32(scale_of(call.mask, call.query.shape[3])),
        softcap=np.float32(call.mask.softcap or 0.0),
        key_block=np.int64(config.key_block),
        budget=np.int64(config.choosing_budget),
        sink=np.int64(config.sink),
        local=np.int64(config.local),
        exact_keys=np.int64(config.exact_keys),
        mass=np.float32(config.mass),
    )
    return blocks, counts


def attend_chosen(
    config: "DecodeSelection", call: Call, blocks: Int32[Array, "heads most"], counts: Int32[Array, " heads"]
) -> WithLogSumExp:
    """Attention of a new token to chosen key blocks and its neighbourhood, or to all keys where they are few."""
    query, keys, rows, mask, *_ = call
    return _call(
        kernels.ATTEND_CHOSEN,
        (query, *_stored(keys), blocks, counts, *_places(rows, keys)),
        query_block=1,
        causal=True,
        scale=scale_of(mask, query.shape[3]),
        softcap=mask.softcap,
        key_block=config.key_block,
        local=config.local,
        exact_keys=config.exact_keys,
    )


def _stored(keys: KeyView) -> tuple[Array, ...]:
    """Keys, values and the scales of both; empty ones where they are floats."""
    none = jnp.zeros((0, 0, 0), jnp.float32)
    scales = (none if scale is None else scale for scale in (keys.key_scale, keys.value_scale))
    return keys.key, keys.value, *scales


def _places(rows: Rows, keys: KeyView) -> tuple[Array, ...]:
    """Where each row lies; an empty table where a slot is one page."""
    table = jnp.zeros((0, 0), jnp.int32) if keys.table is None else keys.table
    return *rows, table


def _call(
    target: str, arrays: tuple[Array, ...], *, scale: float, softcap: float | None, **options: int | float
) -> WithLogSumExp:
    query, value = arrays[0], arrays[2]
    results = (
        jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
    )
    kinds = {bool: bool, int: np.int64, float: np.float32}
    attributes = {name: kinds[type(x)](x) for name, x in options.items()}
    output, lse = jax.ffi.ffi_call(target, results)(
        *arrays, scale=np.float32(scale), softcap=np.float32(softcap or 0.0), **attributes
    )
    return output, lse
