"""Low-rank scores, token by token: queries and keys keep the few directions in which their product lives, in int8.

Source: Loki (Singhania et al., arXiv 2406.02542) keeps the principal components of the keys. Here the two projections
are those of the best rank-r approximation of the *logits* over a calibration text (see `attention.calibration`),
which keeps more at the same rank, because a direction in which keys vary but no query looks costs nothing to drop.

Projected keys are rounded to int8 in units that calibration fixed, so that a key's projection depends on nothing but
the key and may be cached; queries are rounded relative to their own largest component. Sums of products are exact.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8

from ..blocks import pad_axis
from ..calibration import logit_projections
from ..ops import matmul_transposed
from .base import Method, RankingQueries

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
        projections = logit_projections(query, key, self.rank)
        largest = np.abs(np.einsum("htd,hdr->htr", key, projections[:, 1])).max(axis=1)
        unit = np.where(largest > 0, largest, 1.0) / _CALIBRATED_LARGEST
        return np.stack([projections[:, 0] * unit[:, None], projections[:, 1] / unit[:, None]], axis=1).astype(
            np.float32
        )

    def summarize(
        self,
        key: Float[Array, "heads blocks key_block head_dim"],
        basis: Float[Array, "heads 2 head_dim rank"] | None,
    ) -> Int8[Array, "heads blocks key_block padded_rank"]:
        return project_keys(key, required(basis)[:, None])

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        basis: Float[Array, "heads 2 head_dim rank"] | None,
    ) -> RankingQueries:
        projected = project_queries(query, required(basis))
        heads, blocks, queries, _ = projected.shape
        count = self.ranking_count(queries)
        if count < queries:
            norms = jnp.where(present, jnp.sum(jnp.square(projected), axis=-1), -1.0)
            # Two axes: XLA sorts all of it where top-k has more.
            chosen = lax.top_k(norms.reshape(-1, queries), count)[1].reshape(heads, blocks, count)
            projected = jnp.take_along_axis(projected, chosen[..., None], axis=2)
            present = jnp.take_along_axis(present, chosen, axis=2)
        largest = jnp.max(jnp.abs(projected), axis=-1)
        unit = jnp.where(largest > 0, largest, 1.0) / _LARGEST
        return RankingQueries(jnp.round(projected / unit[..., None]).astype(jnp.int8), unit, present)

    def ranking_count(self, queries: int) -> int:
        """How many of a block's queries take part in stage 1."""
        return math.ceil(self.query_share * queries)

    def block_products(
        self, features: Int8[Array, "ranking_queries rank"], summary: Int8[Array, "blocks key_block rank"]
    ) -> Float32[Array, "blocks ranking_queries"]:
        blocks, key_block, rank = summary.shape
        # Sums of integer products of this size are exact in float32, which XLA multiplies faster than int8.
        keys, queries = (x.astype(jnp.float32).reshape(-1, rank) for x in (summary, features))
        return jnp.max(matmul_transposed(keys, queries).reshape(blocks, key_block, -1), axis=1)


def project_queries(
    query: Float[Array, "heads query_blocks queries head_dim"], basis: Float[Array, "heads 2 head_dim rank"]
) -> Float32[Array, "heads query_blocks queries padded_rank"]:
    """The calibrated projections of queries, with zeros up to a multiple of 4 components."""
    return _pad(jnp.matmul(query, basis[:, None, 0].astype(query.dtype), preferred_element_type=jnp.float32))


def project_keys(
    key: Float[Array, "*axes head_dim"], basis: Float[Array, "*#heads 2 head_dim rank"]
) -> Int8[Array, "*axes padded_rank"]:
    """What stage 1 keeps of each key: its calibrated projection as int8, with zeros up to a multiple of 4 components.

    `basis` has the leading axes of `key` up to the tokens, or ones that broadcast to them.
    """
    projected = jnp.matmul(key, basis[..., 1, :, :].astype(key.dtype), preferred_element_type=jnp.float32)
    return _pad(jnp.clip(jnp.round(projected), -_LARGEST, _LARGEST)).astype(jnp.int8)


def padded_rank(basis: Float[Array, "*heads 2 head_dim rank"]) -> int:
    """Components of a projected key, with the zeros."""
    return -(-basis.shape[-1] // 4) * 4


def _pad(x: Float[Array, "*axes rank"]) -> Float[Array, "*axes padded_rank"]:
    """With zeros up to a multiple of 4 components, which processors multiply at once."""
    return pad_axis(x, x.ndim - 1, 4)


def required(basis: Array | None) -> Array:
    """The basis.

    Raises:
        ValueError: there is none.
    """
    if basis is None:
        raise ValueError("low_rank needs calibrated projections: pass basis=, as LowRank.calibrate makes it")
    return basis
