"""Antidiagonal sums: a piece of queries and a run of keys are as important to each other as one antidiagonal of their
products, which every query and every key has a part in.

Source: XAttention (Xu et al., arXiv 2503.16428, algorithm 1). With stride s the estimate of the logits between queries
s i .. s i + s - 1 and keys s j .. s j + s - 1 is the sum over p of q[s i + s - 1 - p] . k[s j + p], divided by s: one
product of rows that are s times as long, for s^2 products. A row of keys of s tokens lies in one piece for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ..blocks import pad_axis
from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, largest_products

_RUNS = "key_runs"


@dataclass(frozen=True)
class Antidiagonal(Method):
    """Scores the largest mean over an antidiagonal; costs `1 / stride` of all products of queries and keys.

    Attributes:
        stride: queries, and keys, of which each takes part in one product; a divisor of the key block.
    """

    name: ClassVar[str] = "antidiagonal"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    single_queries: ClassVar[bool] = False

    stride: int = 8

    def __post_init__(self) -> None:
        if self.stride < 1 or self.stride & (self.stride - 1):
            raise ValueError(f"stride is {self.stride}, expected a power of two")

    def fields(self, head_dim: int, key_block: int) -> Fields:
        if key_block % self.stride:
            raise ValueError(f"stride is {self.stride}, expected a divisor of key_block, which is {key_block}")
        return {_RUNS: Field((self.stride * head_dim,), "float32", self.stride)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Float32[Array, "heads runs features"]:
        return key.astype(jnp.float32).reshape(*key.shape[:2], -1)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        heads, blocks, queries, _ = query.shape
        counted = jnp.where(present[..., None], query, 0)
        pieces = pad_axis(counted, 2, self.stride).reshape(heads, blocks, -1, self.stride, query.shape[3])
        shape = pieces.shape[:3]
        any_present = jnp.any(pad_axis(present, 2, self.stride).reshape(*shape, self.stride), axis=3)
        last = jnp.minimum((jnp.arange(shape[2], dtype=jnp.int32) + 1) * self.stride, queries) - 1
        features = pieces[:, :, :, ::-1].reshape(*shape, -1)
        return RankingQueries(
            features, jnp.full(shape, 1 / self.stride, jnp.float32), any_present, jnp.broadcast_to(last, shape)
        )

    def block_products(
        self, features: Float[Array, "pieces features"], index: Mapping[str, Float32[Array, "blocks runs features"]]
    ) -> Float32[Array, "blocks pieces"]:
        return largest_products(index[_RUNS], features)
