"""Block means: a key block is as important as its mean key. The cheapest stage 1, blind to a single key among others.

Source: SpargeAttn (Zhang et al., arXiv 2502.18137) and FlashPrefill rank blocks by pooled keys.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ..ops import matmul_transposed
from .base import Method, RankingQueries


@dataclass(frozen=True)
class MeanPool(Method):
    """Scores `query . mean(key block)`; costs `keys / key_block` dot products a query."""

    name: ClassVar[str] = "mean_pool"

    def summarize(
        self, key: Float[Array, "heads blocks key_block head_dim"], basis: Array | None
    ) -> Float[Array, "heads blocks head_dim"]:
        return jnp.mean(key.astype(jnp.float32), axis=2).astype(key.dtype)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        basis: Array | None,
    ) -> RankingQueries:
        return RankingQueries(query, jnp.ones(query.shape[:3], jnp.float32), present)

    def block_products(
        self, features: Float[Array, "queries head_dim"], summary: Float[Array, "blocks head_dim"]
    ) -> Float32[Array, "blocks queries"]:
        return matmul_transposed(summary, features)
