"""Projections for low-rank scores, from the queries and keys of a calibration text. Runs once, at compile time, in
numpy.

With M = Cq^1/2 Ck^1/2 = U S V', where Cq is the second moment of the queries and Ck the covariance of the keys, the
rank-r product that is nearest to query . (key - mean key) in the mean square over independent queries and keys is (A'
query) . (B' key) with A = Ck^1/2 V S^-1/2 and B = Cq^1/2 U S^-1/2, the first r columns of each. The mean key shifts
all logits of a query alike, so it plays no part in a ranking. Loki (arXiv 2406.02542) is the case Cq = 1.
"""

import numpy as np
from jaxtyping import Float


def logit_projections(
    query: Float[np.ndarray, "query_heads tokens head_dim"],
    key: Float[np.ndarray, "kv_heads tokens head_dim"],
    rank: int,
) -> tuple[Float[np.ndarray, "kv_heads head_dim rank"], Float[np.ndarray, "kv_heads head_dim rank"]]:
    """The projections of queries and of keys that keep most of a layer's logits.

    Args:
        query: queries after the rotary embedding.
        key: keys after the rotary embedding; `query_heads` is a multiple of `kv_heads`.
        rank: dimensions to keep; a rank above `head_dim` keeps them all.
    """
    kv_heads, _, head_dim = key.shape
    rank = min(rank, head_dim)
    grouped = query.astype(np.float64).reshape(kv_heads, -1, head_dim)
    pairs = [_head_projections(q, k.astype(np.float64), rank) for q, k in zip(grouped, key, strict=True)]
    of_queries, of_keys = zip(*pairs, strict=True)
    return np.stack(of_queries), np.stack(of_keys)


def _head_projections(
    query: Float[np.ndarray, "queries head_dim"], key: Float[np.ndarray, "tokens head_dim"], rank: int
) -> tuple[Float[np.ndarray, "head_dim rank"], Float[np.ndarray, "head_dim rank"]]:
    centred = key - key.mean(axis=0)
    query_root = _square_root(query.T @ query / len(query))
    key_root = _square_root(centred.T @ centred / len(key))
    left, singular, right = np.linalg.svd(query_root @ key_root)
    # A direction of no variance keeps nothing: its projection is 0, not a division by 0.
    kept = singular[:rank] > 1e-9 * max(singular[0], 1e-30)
    inverse_root = np.where(kept, 1.0 / np.sqrt(np.where(kept, singular[:rank], 1.0)), 0.0)
    return (
        (key_root @ right[:rank].T * inverse_root).astype(np.float32),
        (query_root @ left[:, :rank] * inverse_root).astype(np.float32),
    )


def _square_root(moment: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
