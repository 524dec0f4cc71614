"""Low-rank scores, token by token: queries and keys keep the few directions in which their product lives.

Source: Loki (Singhania et al., arXiv 2406.02542) keeps the principal components of the keys. Here the two projections
are those of the best rank-r approximation of the *logits* over a calibration text (see `attention.calibration`),
which keeps more at the same rank, because a direction in which keys vary but no query looks costs nothing to drop.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..calibration import logit_projections
from ..ops import matmul, matmul_transposed
from .base import Method


@dataclass(frozen=True)
class LowRank(Method):
    """Scores the largest `projected query . projected key` of each key block.

    Attributes:
        rank: dimensions that the projections keep, all of them where the model's head_dim is smaller.
        query_share: share of a block's queries that take part in stage 1, those with the largest projected norm. The
            others find their keys among those that these bring in, and in the exact second stage all take part.
    """

    name: ClassVar[str] = "low_rank"
    needs_basis: ClassVar[bool] = True

    rank: int = 32
    query_share: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if not 0 < self.query_share <= 1:
            raise ValueError(f"query_share is {self.query_share}, expected a share above 0 and up to 1")

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> Float[np.ndarray, "kv_heads 2 head_dim rank"]:
        return logit_projections(query, key, self.rank)

    def summarize(
        self,
        key: Float[Array, "heads blocks key_block head_dim"],
        basis: Float[Array, "heads 2 head_dim rank"] | None,
    ) -> Float[Array, "heads blocks key_block rank"]:
        heads, blocks, key_block, head_dim = key.shape
        projection = _required(basis)[:, 1].astype(key.dtype)
        flat = key.reshape(heads, blocks * key_block, head_dim)
        projected = jnp.einsum("hnd,hdr->hnr", flat, projection, preferred_element_type=jnp.float32)
        return projected.astype(key.dtype).reshape(heads, blocks, key_block, -1)

    def project(
        self, query: Float[Array, "queries head_dim"], basis: Float[Array, "2 head_dim rank"] | None
    ) -> Float[Array, "ranking_queries rank"]:
        projected = matmul(query, _required(basis)[0].astype(query.dtype))
        count = math.ceil(self.query_share * query.shape[0])
        if count < query.shape[0]:
            norms = jnp.sum(jnp.square(projected), axis=-1)
            projected = projected[lax.top_k(norms, count)[1]]
        return projected.astype(query.dtype)

    def block_logits(
        self, query: Float[Array, "ranking_queries rank"], summary: Float[Array, "blocks key_block rank"]
    ) -> Float[Array, "blocks ranking_queries"]:
        blocks, key_block, rank = summary.shape
        logits = matmul_transposed(summary.reshape(blocks * key_block, rank), query)
        return jnp.max(logits.reshape(blocks, key_block, -1), axis=1)


def _required(basis: Array | None) -> Array:
    if basis is None:
        raise ValueError("low_rank needs calibrated projections: pass basis=, as LowRank.calibrate makes it")
    return basis
