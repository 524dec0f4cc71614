"""How near a configuration's attention is to exact attention, layer by layer and head by head."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from ..attention import Attention, Constants, Exact, KeyView, Mask, Rows, TwoStage, attend
from ..attention.blocks import MASKED
from ..attention.logits import scale_of
from ..attention.ops import cap, matmul_transposed
from .selected_keys import selected_keys

TOP_KEYS = 64
"""Keys of the largest weight of each query, of which the recall is the share that was selected."""


@dataclass(frozen=True)
class LayerFidelity:
    """One layer in one configuration, over some query blocks of a window of text.

    Each figure is a mean over the queries of a block and query head, by block and query head.

    Attributes:
        configuration: its name.
        text: name of the text.
        start: the window's first token in it.
        layer: its number, from 0.
        positions: the first query of each block.
        mass: share of the exact softmax that falls on selected keys.
        recall: share of each query's `TOP_KEYS` keys of the largest weight that were selected.
        error: norm of the difference of the output from that of exact attention, over the norm of the latter.
        keys: number of selected keys.
    """

    configuration: str
    text: str
    start: int
    layer: int
    positions: tuple[int, ...]
    mass: tuple[tuple[float, ...], ...]
    recall: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]
    keys: tuple[tuple[int, ...], ...]


class Figures(NamedTuple):
    """What `LayerFidelity` has, as arrays."""

    mass: Float32[Array, "blocks query_heads"]
    recall: Float32[Array, "blocks query_heads"]
    error: Float32[Array, "blocks query_heads"]
    keys: Int32[Array, "blocks query_heads"]


def sampled_blocks(attentions: Sequence[TwoStage], tokens: int, count: int) -> tuple[int, ...]:
    """First positions of at most `count` query blocks, evenly spread over those that select in every attention: from
    the first to the last of them, and an empty tuple if there is none.
    """
    size = block_size(attentions)
    first = -(-max(attention.exact_keys for attention in attentions) // size)
    last = (tokens - size) // size - 1
    if last < first:
        return ()
    blocks = np.unique(np.linspace(first, last, count).round().astype(int))
    return tuple(int(block) * size for block in blocks)


def block_size(attentions: Sequence[TwoStage]) -> int:
    """Queries that are recorded at each of these positions: the largest query block."""
    return max(attention.query_block for attention in attentions)


@partial(jax.jit, static_argnames=("attention", "mask"))
def measure_layer(
    attention: Attention,
    mask: Mask,
    query: Float[Array, "blocks query_heads queries head_dim"],
    key: Float[Array, "1 kv_heads tokens head_dim"],
    value: Float[Array, "1 kv_heads tokens value_dim"],
    starts: Int32[Array, " blocks"],
    constants: Constants,
) -> Figures:
    """The figures of one layer, at query blocks that begin at some positions.

    Args:
        attention: the configuration's.
        mask: how logits are made.
        query: of the query blocks.
        key, value: of the whole window.
        starts: the first position of each block.
        constants: what the attention was calibrated to in this layer.
    """
    blocks, heads, queries, width = query.shape
    kv_heads, tokens = key.shape[1:3]
    group = heads // kv_heads
    rows = Rows(jnp.zeros(blocks, jnp.int32), starts, jnp.full(blocks, tokens, jnp.int32))
    keys = KeyView(key, value)
    exact = attend(Exact(), query, keys, rows, mask)
    error = _relative_error(attend(attention, query, keys, rows, mask, constants), exact)
    selected = selected_keys(attention, query, key, rows, mask, constants)

    def of_head(index: Array) -> tuple[Array, Array]:
        block, head = index // heads, index % heads
        position = starts[block] + jnp.arange(queries)
        products = matmul_transposed(query[block, head], key[0, head // group])
        logits = cap(products * scale_of(mask, width), mask.softcap)
        logits = jnp.where(jnp.arange(tokens) <= position[:, None], logits, MASKED)
        return _kept(logits, selected[block, head])

    mass, recall = lax.map(of_head, jnp.arange(blocks * heads))
    return Figures(
        mass.reshape(blocks, heads),
        recall.reshape(blocks, heads),
        jnp.mean(error, axis=2),
        jnp.sum(selected, axis=2, dtype=jnp.int32),
    )


def _kept(logits: Float[Array, "lanes tokens"], selected: Bool[Array, " tokens"]) -> tuple[Array, Array]:
    """Mass and recall of a selection, means over the queries."""
    weights = jax.nn.softmax(logits)
    largest, top = lax.top_k(logits, min(TOP_KEYS, logits.shape[1]))
    seen = largest > MASKED
    recall = jnp.sum(seen & selected[top], axis=1) / jnp.sum(seen, axis=1)
    return jnp.mean(jnp.sum(jnp.where(selected, weights, 0.0), axis=1)), jnp.mean(recall)


def _relative_error(output: Float[Array, "... width"], exact: Float[Array, "... width"]) -> Float32[Array, "..."]:
    output, exact = output.astype(jnp.float32), exact.astype(jnp.float32)
    norm = jnp.linalg.norm(exact, axis=-1)
    return jnp.linalg.norm(output - exact, axis=-1) / jnp.where(norm > 0, norm, 1.0)
