"""Bounds of key blocks: the range of each component of a block's keys, and what a query could make of it at most.

Sources: Quest (Tang et al., arXiv 2406.10774, algorithm 1) scores a page of keys with component-wise minimum m and
maximum M by sum_i max(q_i m_i, q_i M_i), which no key's product exceeds. The cuboid mean of ArkVale (Chen et al.,
NeurIPS 2024) scores it by q . c + |q| . w with the centre c = (m + M) / 2 and w = mean |k - c|, a typical key in place
of the best conceivable one.

Both are one dot product of twice the width: max(q_i m_i, q_i M_i) = min(q_i, 0) m_i + max(q_i, 0) M_i.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Float32

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, largest_products

BOUNDS = ("quest", "cuboid_mean")
PAGE_BOUND = "page_bound"
"""The index: [m, M] or [c, w]. In bfloat16, which is exact for the range of bfloat16 keys."""


@dataclass(frozen=True)
class PageBound(Method):
    """Scores a bound of `query . key` over each key block; costs `2 * keys / key_block` dot products a query.

    Attributes:
        bound: "quest", the largest product that the block's range allows, or "cuboid_mean", that of a typical key.
    """

    name: ClassVar[str] = "page_bound"
    source: ClassVar[str] = "Quest, arXiv 2406.10774; ArkVale, NeurIPS 2024"
    key_block: ClassVar[int] = 16

    bound: str = dataclasses.field(default="quest", metadata={"choices": BOUNDS})

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise ValueError(f"bound is {self.bound!r}, expected one of: {', '.join(BOUNDS)}")

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {PAGE_BOUND: Field((2 * head_dim,), "bfloat16", key_block)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> BFloat16[Array, "heads runs twice_head_dim"]:
        key = key.astype(jnp.float32)
        least, most = jnp.min(key, axis=2), jnp.max(key, axis=2)
        if self.bound == "cuboid_mean":
            centre = (least + most) / 2
            least, most = centre, jnp.mean(jnp.abs(key - centre[:, :, None]), axis=2)
        return jnp.concatenate([least, most], axis=-1).astype(jnp.bfloat16)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        of_bound = {"quest": (jnp.minimum(query, 0), jnp.maximum(query, 0)), "cuboid_mean": (query, jnp.abs(query))}
        features = jnp.concatenate(of_bound[self.bound], axis=-1)
        return every_query(features, present)

    def block_products(
        self,
        features: Float[Array, "queries twice_head_dim"],
        index: Mapping[str, BFloat16[Array, "blocks 1 twice_head_dim"]],
    ) -> Float32[Array, "blocks queries"]:
        return largest_products(index[PAGE_BOUND], features)
