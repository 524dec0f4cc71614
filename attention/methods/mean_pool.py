"""Block means: a key block is as important as its mean key. The cheapest stage 1, blind to a single key among others.

Source: SpargeAttn (Zhang et al., arXiv 2502.18137) and FlashPrefill rank blocks by pooled keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, largest_products

_MEAN = "mean_key"


@dataclass(frozen=True)
class MeanPool(Method):
    """Scores `query . mean(key block)`; costs `keys / key_block` dot products a query."""

    name: ClassVar[str] = "mean_pool"
    source: ClassVar[str] = "SpargeAttn, arXiv 2502.18137"

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {_MEAN: Field((head_dim,), "float32", key_block)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Float32[Array, "heads runs head_dim"]:
        return jnp.mean(key.astype(jnp.float32), axis=2)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        return every_query(query, present)

    def block_products(
        self, features: Float[Array, "queries head_dim"], index: Mapping[str, Float32[Array, "blocks 1 head_dim"]]
    ) -> Float32[Array, "blocks queries"]:
        return largest_products(index[_MEAN], features)
