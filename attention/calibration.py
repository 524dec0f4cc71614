"""Projections for low-rank scores, from the queries and keys of a calibration text. Runs once, at compile time, in
float64.

With M = Cq^1/2 Ck^1/2 = U S V', where Cq is the second moment of the queries and Ck the covariance of the keys, the
rank-r product that is nearest to query . (key - mean key) in the mean square over independent queries and keys is (A'
query) . (B' key) with A = Ck^1/2 V S^-1/2 and B = Cq^1/2 U S^-1/2, the first r columns of each. The mean key shifts
all logits of a query alike, so it plays no part in a ranking. Loki (arXiv 2406.02542) is the case Cq = 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64


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
    with jax.enable_x64(True):  # pyright: ignore[reportCallIssue]
        moments = [np.asarray(moment) for moment in _moments(query.reshape(kv_heads, -1, head_dim), key)]
    pairs = [_head_projections(*of_head, min(rank, head_dim)) for of_head in zip(*moments, strict=True)]
    of_queries, of_keys = zip(*pairs, strict=True)
    return np.stack(of_queries), np.stack(of_keys)


@jax.jit
def _moments(
    query: Float[Array, "kv_heads queries head_dim"], key: Float[Array, "kv_heads tokens head_dim"]
) -> tuple[Float64[Array, "kv_heads head_dim head_dim"], Float64[Array, "kv_heads head_dim head_dim"]]:
    """The second moments of the queries and the covariances of the keys.

    In XLA, whose threads sleep while they wait: those of numpy's BLAS do not, which on a busy machine takes minutes.
    """
    key = key.astype(jnp.float64)
    centred = key - jnp.mean(key, axis=1, keepdims=True)
    return _second_moments(query.astype(jnp.float64)), _second_moments(centred)


def _second_moments(x: Float64[Array, "heads n d"]) -> Float64[Array, "heads d d"]:
    return jnp.einsum("hni,hnj->hij", x, x) / x.shape[1]


def _head_projections(
    query_moment: Float64[np.ndarray, "head_dim head_dim"],
    key_covariance: Float64[np.ndarray, "head_dim head_dim"],
    rank: int,
) -> tuple[Float[np.ndarray, "head_dim rank"], Float[np.ndarray, "head_dim rank"]]:
    query_root, key_root = _square_root(query_moment), _square_root(key_covariance)
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
