"""Attention as the tests call it: plain arrays in, one row of memory for each row of the call."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import Attention, Call, Exact, KeyView, LowRank, Mask, Rows, TwoStage
from iceformer.attention import attend as dispatch
from iceformer.attention.methods.low_rank import KEY_PROJECTION, LOST_MEAN, PROJECTED_KEY, QUERY_PROJECTION
from iceformer.attention.two_stage import two_stage_attention as in_xla

from ..few import few

XLA_IS_SLOW = pytest.mark.parametrize("form", few(["xla", "kernels"], ["kernels"]), indirect=True)
"""Of a test that takes XLA long to compile, and whose code in XLA other tests run."""


def constants_of(basis: Any) -> dict[str, Any]:
    """The constants of `low_rank`, from projections [kv_heads, 2, head_dim, rank] of queries and keys that lose nothing
    of the mean key."""
    if basis is None:
        return {}
    return {QUERY_PROJECTION: basis[:, 0], KEY_PROJECTION: basis[:, 1], LOST_MEAN: jnp.zeros(basis[:, 0, :, 0].shape)}


def scattered(key: jax.Array, value: jax.Array, page: int, seed: int) -> tuple[KeyView, jax.Array]:
    """Keys and values [rows, kv_heads, keys, width] in memory that has them in another order, and the slot of each row.

    Where `page` is 0 a slot is one page; otherwise pages of so many tokens lie anywhere. What is in memory besides is
    NaN.
    """
    rng, rows = np.random.default_rng(seed), key.shape[0]
    slots = rows + 1
    slot = rng.permutation(slots)[:rows]
    size = page or key.shape[2]
    of_slot = -(-key.shape[2] // size)
    table = rng.permutation(slots * of_slot + 2)[: slots * of_slot].reshape(slots, of_slot)
    places = table[slot] if page else slot[:, None]

    def put(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, of_slot * size - x.shape[2]), (0, 0)), constant_values=np.nan)
        pieces = padded.reshape(*x.shape[:2], of_slot, size, x.shape[3]).swapaxes(1, 2)
        memory = jnp.full((slots * of_slot + (2 if page else 0), *pieces.shape[2:]), np.nan, x.dtype)
        return memory.at[places].set(pieces)

    return KeyView(put(key), put(value), {}, jnp.asarray(table, jnp.int32) if page else None), jnp.asarray(slot)


def attend(
    attention: Attention,
    query: Any,
    key: Any,
    value: Any,
    *,
    offset: Any,
    lengths: Any,
    basis: Any = None,
    projected: Any = None,
    **mask: Any,
) -> jax.Array:
    """`attend` with the fields of `Mask` as arguments."""
    keys, rows = _arrays(key, value, projected), _rows(offset, lengths)
    return dispatch(attention, query, keys, rows, Mask(**mask), constants_of(basis))


def exact_attention(
    query: Any, key: Any, value: Any, *, query_block: int = 256, key_block: int = 512, **options: Any
) -> jax.Array:
    """Exact attention."""
    return attend(Exact(query_block, key_block), query, key, value, **options)


def two_stage_attention(
    config: TwoStage,
    query: Any,
    key: Any,
    value: Any,
    *,
    offset: Any,
    lengths: Any,
    basis: Any = None,
    projected: Any = None,
    constants: Any = None,
    **mask: Any,
) -> jax.Array:
    """Two-stage attention, also where the budget covers every key, or no query block selects."""
    keys, rows = _arrays(key, value, projected), _rows(offset, lengths)
    constants = constants_of(basis) if constants is None else constants
    rows = rows._replace(length=jnp.minimum(rows.length, keys.capacity))
    call = Call(query, keys, rows, Mask(**mask), constants)
    if config.objection(call) is None:
        return config.attend_in_kernel(call)
    return in_xla(config, call, config.selecting(rows, query.shape[2], call.mask.causal))


def project_keys(key: jax.Array, basis: Any) -> jax.Array:
    """What `low_rank` keeps of keys [batch, kv_heads, keys, head_dim]."""
    runs = key.reshape(-1, key.shape[2], 1, key.shape[3])
    return LowRank().entries(PROJECTED_KEY, runs, constants_of(basis)).reshape(*key.shape[:3], -1)


def _arrays(key: jax.Array, value: jax.Array, projected: Any) -> KeyView:
    fields: Mapping[str, Any] = {} if projected is None else {PROJECTED_KEY: projected}
    return KeyView(key, value, fields)


def _rows(offset: Any, lengths: Any) -> Rows:
    whole = Rows.whole(jnp.asarray(lengths, "int32"))
    return whole._replace(offset=jnp.asarray(offset, "int32"))
