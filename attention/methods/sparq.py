"""SparQ: the few largest components of the queries, read from a second copy of the keys that has each component in one
piece.

Source: Ribar et al., arXiv 2312.04985, algorithm 1. Of a group's queries q the r components i with the largest sum of
|q_i| are kept, and scores are softmax(q_r . K_r / tau) with tau = sqrt(d * |q_r|_1 / |q|_1), d = head_dim: a query of
which less is kept has the lower temperature, in place of the products that its scores lack. Made for decoding; a query
block of a prompt keeps the components that are largest over all its queries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ..cache import Field, Fields
from ..keys import LEAST_PAGE
from .base import Constants, Method, RankingQueries, every_query

KEY_COMPONENTS = "key_components"
"""The index: the keys of a run of tokens, component by component. In float32, because XLA reads single components of
bfloat16 many times more slowly."""
RUN = LEAST_PAGE
"""Tokens of an entry: as many as fit in every page, so that a component is read in long pieces."""


@dataclass(frozen=True)
class Sparq(Method):
    """Scores each token by `rank` components of the queries and keys.

    Attributes:
        rank: components that are read, all of them where the model's head_dim is smaller.
    """

    name: ClassVar[str] = "sparq"
    source: ClassVar[str] = "SparQ, arXiv 2312.04985"
    key_block: ClassVar[int] = 1

    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {KEY_COMPONENTS: Field((head_dim, RUN), "float32", RUN)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Float32[Array, "heads runs head_dim tokens"]:
        return key.swapaxes(2, 3).astype(jnp.float32)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        wide = jnp.where(present[..., None], query.astype(jnp.float32), 0.0)
        size = jnp.abs(wide)
        chosen = self._largest(jnp.sum(size, axis=2))
        kept = jnp.any(chosen[..., None] == jnp.arange(query.shape[3]), axis=2)[:, :, None]
        whole, part = jnp.sum(size, axis=-1), jnp.sum(jnp.where(kept, size, 0.0), axis=-1)
        scale = jnp.sqrt(jnp.where(part > 0, whole / jnp.where(part > 0, part, 1.0), 1.0))
        return every_query(jnp.where(kept, wide, 0.0), present, scale)

    def block_products(
        self,
        features: Float32[Array, "queries head_dim"],
        index: Mapping[str, Float32[Array, "spans runs head_dim run"]],
    ) -> Float32[Array, "tokens queries"]:
        # The queries are 0 in all other components.
        chosen = self._largest(jnp.sum(jnp.abs(features), axis=0))
        runs = index[KEY_COMPONENTS].reshape(-1, features.shape[1], RUN)
        # One component after the other, because XLA would copy them together for a matrix product, at a multiple of the
        # time.
        products = jnp.zeros((features.shape[0], runs.shape[0], RUN))
        for number in chosen:
            component = lax.dynamic_index_in_dim(runs, number, axis=1, keepdims=False)
            products += features[:, number, None, None] * component
        return products.reshape(features.shape[0], -1).T

    def _largest(self, size: Float32[Array, "*axes head_dim"]) -> Array:
        """The numbers of the components that are kept, [*axes, rank]."""
        return lax.top_k(size, min(self.rank, size.shape[-1]))[1]
