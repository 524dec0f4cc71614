"""Low-rank scores, token by token: queries and keys keep the few directions in which their product lives, in int8.

Source: Loki (Singhania et al., arXiv 2406.02542) keeps the principal components of the keys. Here the two projections
are those of the best rank-r approximation of the *logits* over a calibration text (see `attention.calibration`),
which keeps more at the same rank, because a direction in which keys vary but no query looks costs nothing to drop.

Projected keys are rounded to int8 in units that calibration fixed, so that a key's projection depends on nothing but
the key and may be cached; queries are rounded relative to their own largest component. Sums of products are exact.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8

from ..blocks import pad_axis
from ..cache import Field, Fields
from ..calibration import logit_projections
from .base import Constants, Method, RankingQueries, every_lane, largest_products, of_heads, required

PROJECTED_KEY = "projected_key"
"""The index: a projection of each key."""
QUERY_PROJECTION, KEY_PROJECTION, LOST_MEAN = "query_projection", "key_projection", "lost_mean"
"""The constants: the two projections, and what they lose of the mean key."""
_LARGEST = 127
_CALIBRATED_LARGEST = 100.0
"""What the calibration text's largest key component becomes; the rest up to `_LARGEST` is for larger ones."""


@dataclass(frozen=True)
class LowRank(Method):
    """Scores the largest `projected query . projected key` of each key block.

    Attributes:
        rank: dimensions that the projections keep, all of them where the model's head_dim is smaller.
        query_share: share of a block's queries that take part in stage 1, those with the largest projected norm. The
            others find their keys among those that these bring in, and in the exact second stage all take part.
    """

    name: ClassVar[str] = "low_rank"
    source: ClassVar[str] = "after Loki, arXiv 2406.02542"
    calibrated: ClassVar[bool] = True

    rank: int = 32
    query_share: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if not 0 < self.query_share <= 1:
            raise ValueError(f"query_share is {self.query_share}, expected a share above 0 and up to 1")

    @property
    def with_every_query(self) -> "LowRank":
        return replace(self, query_share=1.0)

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Float32[np.ndarray, "kv_heads head_dim ..."]]:
        of_queries, of_keys = self.projections(query, key)
        largest = np.abs(np.einsum("htd,hdr->htr", key, of_keys)).max(axis=1)
        unit = np.where(largest > 0, largest, 1.0)[:, None] / _CALIBRATED_LARGEST
        mean = key.mean(axis=1)
        lost = mean - np.einsum("hdr,her,he->hd", of_queries, of_keys, mean)
        constants = {QUERY_PROJECTION: of_queries * unit, KEY_PROJECTION: of_keys / unit, LOST_MEAN: lost}
        return {name: constant.astype(np.float32) for name, constant in constants.items()}

    def projections(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> tuple[Float[np.ndarray, "kv_heads head_dim rank"], Float[np.ndarray, "kv_heads head_dim rank"]]:
        """Those of queries and of keys whose products stand for the logits."""
        return logit_projections(query, key, self.rank)

    def offsets(
        self, query: Float[Array, "heads query_blocks queries head_dim"], constants: Constants
    ) -> Float32[Array, "heads query_blocks queries"]:
        lost = of_heads(required(constants, LOST_MEAN, self.name), query.shape[0]).astype(query.dtype)
        return jnp.einsum("hbqd,hd->hbq", query, lost, preferred_element_type=jnp.float32)

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {PROJECTED_KEY: Field((_padded(min(self.rank, head_dim)),), "int8")}

    def entries(
        self, field: str, key: Float[Array, "heads runs 1 head_dim"], constants: Constants
    ) -> Int8[Array, "heads runs padded_rank"]:
        return project_keys(key[:, :, 0], of_heads(required(constants, KEY_PROJECTION, self.name), key.shape[0]))

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        projected = self.projected_queries(query, constants)
        heads, blocks, queries, _ = projected.shape
        count, lane = self.ranking_count(queries), every_lane(query)
        if count < queries:
            norms = jnp.where(present, jnp.sum(jnp.square(projected), axis=-1), -1.0)
            # Two axes: XLA sorts all of it where top-k has more.
            lane = lax.top_k(norms.reshape(-1, queries), count)[1].reshape(heads, blocks, count)
            projected = jnp.take_along_axis(projected, lane[..., None], axis=2)
            present = jnp.take_along_axis(present, lane, axis=2)
        largest = jnp.max(jnp.abs(projected), axis=-1)
        unit = jnp.where(largest > 0, largest, 1.0) / _LARGEST
        return RankingQueries(jnp.round(projected / unit[..., None]).astype(jnp.int8), unit, present, lane)

    def projected_queries(
        self, query: Float[Array, "heads query_blocks queries head_dim"], constants: Constants
    ) -> Float32[Array, "heads query_blocks queries padded_rank"]:
        """The calibrated projections of queries, with zeros up to a multiple of 4 components."""
        projection = of_heads(required(constants, QUERY_PROJECTION, self.name), query.shape[0])[:, None]
        return _pad(jnp.matmul(query, projection.astype(query.dtype), preferred_element_type=jnp.float32))

    def ranking_count(self, queries: int) -> int:
        """How many of a block's queries take part in stage 1."""
        return math.ceil(self.query_share * queries)

    def block_products(
        self,
        features: Int8[Array, "ranking_queries padded_rank"],
        index: Mapping[str, Int8[Array, "blocks key_block padded_rank"]],
    ) -> Float32[Array, "blocks ranking_queries"]:
        # Sums of integer products of this size are exact in float32, which XLA multiplies faster than int8.
        return largest_products(index[PROJECTED_KEY], features.astype(jnp.float32))


def project_keys(
    key: Float[Array, "heads tokens head_dim"], projection: Float[Array, "heads head_dim rank"]
) -> Int8[Array, "heads tokens padded_rank"]:
    """The calibrated projections of keys as int8, with zeros up to a multiple of 4 components."""
    projected = jnp.matmul(key, projection.astype(key.dtype), preferred_element_type=jnp.float32)
    return _pad(jnp.clip(jnp.round(projected), -_LARGEST, _LARGEST)).astype(jnp.int8)


def _pad(x: Float[Array, "*axes rank"]) -> Float[Array, "*axes padded_rank"]:
    """With zeros up to a multiple of 4 components, which processors multiply at once."""
    return pad_axis(x, x.ndim - 1, 4)


def _padded(rank: int) -> int:
    return -(-rank // 4) * 4
