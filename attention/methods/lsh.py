"""Locality-sensitive hashing: keys that collide with a query in many tables are likely to point where it points.

Source: MagicPIG (Chen et al., arXiv 2410.16179): SimHash of mean-centred keys, K = 10 bits in each of L = 150 tables; a
key is a candidate if it collides in at least two. The paper samples among the candidates, by importance; here they are
ranked by how many tables they collide in, and the selection's softmax is exact. Centred are the keys by the mean of a
calibration text. Directions are random signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, of_heads, required

_HASHES, _MEAN = "key_hashes", "mean_of_keys"
_LEAST_COLLISIONS = 2


@dataclass(frozen=True)
class Lsh(Method):
    """Ranks a key block by the number of tables in which its best key collides with a query.

    Attributes:
        tables: number of hash tables.
        bits: of a hash, at most 30.
        seed: of the directions.
    """

    name: ClassVar[str] = "lsh"
    source: ClassVar[str] = "MagicPIG, arXiv 2410.16179"
    calibrated: ClassVar[bool] = True
    estimates: ClassVar[bool] = False

    tables: int = 150
    bits: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tables < 1 or not 1 <= self.bits <= 30:
            raise ValueError(f"tables is {self.tables} and bits is {self.bits}, expected at least 1, and 1 to 30 bits")

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Float32[np.ndarray, "kv_heads head_dim"]]:
        return {_MEAN: key.mean(axis=1).astype(np.float32)}

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {_HASHES: Field((self.tables,), "int32")}

    def entries(
        self, field: str, key: Float[Array, "heads runs 1 head_dim"], constants: Constants
    ) -> Int32[Array, "heads runs tables"]:
        mean = of_heads(required(constants, _MEAN, self.name), key.shape[0])
        return self._hashes(key[:, :, 0].astype(jnp.float32) - mean[:, None])

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        return every_query(self._hashes(query.astype(jnp.float32)), present)

    def block_products(
        self, features: Int32[Array, "queries tables"], index: Mapping[str, Int32[Array, "blocks key_block tables"]]
    ) -> Float32[Array, "blocks queries"]:
        collisions = jnp.sum(index[_HASHES][:, :, None] == features, axis=3)
        best = jnp.max(collisions, axis=1)
        return jnp.where(best >= _LEAST_COLLISIONS, best, 0).astype(jnp.float32)

    def _hashes(self, x: Float32[Array, "*axes head_dim"]) -> Int32[Array, "*axes tables"]:
        shape = (x.shape[-1], self.tables * self.bits)
        signs = np.random.default_rng(self.seed).integers(0, 2, shape, np.int8) * 2 - 1
        sides = (x @ jnp.asarray(signs, jnp.float32) > 0).reshape(*x.shape[:-1], self.tables, self.bits)
        return jnp.sum(sides << np.arange(self.bits), axis=-1, dtype=jnp.int32)
