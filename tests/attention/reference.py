"""Attention in plain numpy, float64, one query at a time: slow, obvious, and independent of the package."""

import numpy as np


def naive_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    offset: np.ndarray,
    lengths: np.ndarray,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    chosen: np.ndarray | None = None,
    relative_bias: np.ndarray | None = None,
) -> np.ndarray:
    """[batch, heads, queries, value_dim]; `chosen` [batch, heads, queries, keys] narrows what a query may see."""
    batch, query_heads, queries, head_dim = query.shape
    group = query_heads // key.shape[1]
    out = np.zeros((batch, query_heads, queries, value.shape[-1]))
    factor = head_dim**-0.5 if scale is None else scale
    for row, head, index in np.ndindex(batch, query_heads, queries):
        position = offset[row] + index
        seen = [
            j
            for j in range(key.shape[2])
            if j < lengths[row]
            and (not causal or j <= position)
            and (window is None or abs(position - j) < window)
            and (chosen is None or chosen[row, head, index, j])
        ]
        if not seen:
            continue
        logits = key[row, head // group, seen].astype(np.float64) @ query[row, head, index].astype(np.float64) * factor
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if relative_bias is not None:
            reach = relative_bias.shape[1] // 2
            logits += [relative_bias[head, reach + min(max(j - position, -reach), reach)] for j in seen]
        weights = np.exp(logits - logits.max())
        out[row, head, index] = weights / weights.sum() @ value[row, head // group, seen].astype(np.float64)
    return out


def random_inputs(
    seed: int, batch: int, query_heads: int, kv_heads: int, queries: int, keys: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of standard normal entries, float32."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, query_heads, queries, head_dim), *[(batch, kv_heads, keys, head_dim)] * 2]
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query, key, value
