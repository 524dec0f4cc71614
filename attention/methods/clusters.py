"""Clusters: a key block is as important as the best of the centroids that its keys gather around.

Source: RetroInfer (Chen et al., arXiv 2505.02922) clusters the keys of segments of 8192 tokens by k-means, about 16
keys a cluster, in 10 rounds, after their mean is taken away. Here clusters stay inside of key blocks: what is kept of a
token must not depend on tokens that follow later, and a selection takes whole key blocks. With one cluster a block this
is `mean_pool`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, largest_products

_CENTROIDS = "cluster_centroids"
_ROUNDS = 10


@dataclass(frozen=True)
class Clusters(Method):
    """Scores the largest `query . centroid` of each key block.

    Attributes:
        cluster_size: keys of a cluster, on average; as many clusters as whole ones fit into a key block, at least one.
    """

    name: ClassVar[str] = "clusters"
    source: ClassVar[str] = "RetroInfer, arXiv 2505.02922"
    key_block: ClassVar[int] = 32

    cluster_size: int = 4

    def __post_init__(self) -> None:
        if self.cluster_size < 1:
            raise ValueError(f"cluster_size is {self.cluster_size}, expected at least 1 key")

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {_CENTROIDS: Field((max(1, key_block // self.cluster_size), head_dim), "float32", key_block)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Float32[Array, "heads runs clusters head_dim"]:
        key, tokens = key.astype(jnp.float32), key.shape[2]
        count = max(1, tokens // self.cluster_size)
        mean = jnp.mean(key, axis=2, keepdims=True)
        centred = key - mean

        def step(_: Array, centroids: Array) -> Array:
            nearness = jnp.einsum("hrtd,hrcd->hrtc", centred, centroids)
            nearness -= jnp.sum(jnp.square(centroids), axis=3)[:, :, None] / 2
            member = jax.nn.one_hot(jnp.argmax(nearness, axis=3), count)
            sums, sizes = jnp.einsum("hrtc,hrtd->hrcd", member, centred), jnp.sum(member, axis=2)[..., None]
            return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centroids)

        return mean + lax.fori_loop(0, _ROUNDS, step, centred[:, :, : count * self.cluster_size : self.cluster_size])

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        return every_query(query, present)

    def block_products(
        self,
        features: Float[Array, "queries head_dim"],
        index: Mapping[str, Float32[Array, "blocks 1 clusters head_dim"]],
    ) -> Float32[Array, "blocks queries"]:
        return largest_products(index[_CENTROIDS], features)
