"""Product quantisation: of each part of a key only the number of its nearest centroid is kept, in a byte.

Source: PQCache (Zhang et al., arXiv 2407.12820): m parts of the dimensions, b = 6 bits a part, and a score that is the
sum of m looked-up products of query parts with centroids. The paper clusters the keys of each prompt. Here the
centroids are those of a calibration text, so that a key's codes depend on nothing but the key and may be cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, of_heads, required

_CODES, _CENTROIDS = "key_codes", "key_centroids"
_MOST_KEYS, _ROUNDS = 2048, 8
"""Keys that the centroids are made of, at most, and rounds of k-means."""


@dataclass(frozen=True)
class ProductQuant(Method):
    """Scores the largest sum of products with the centroids of a key's parts, in each key block.

    Attributes:
        parts: of the dimensions, which they must divide: bytes of a token's index.
        bits: of a part's code: 2^bits centroids, at most 8 bits.
    """

    name: ClassVar[str] = "product_quant"
    source: ClassVar[str] = "PQCache, arXiv 2407.12820"
    calibrated: ClassVar[bool] = True

    parts: int = 8
    bits: int = 6

    def __post_init__(self) -> None:
        if self.parts < 1 or not 1 <= self.bits <= 8:
            raise ValueError(
                f"parts is {self.parts} and bits is {self.bits}, expected at least 1 part, and 1 to 8 bits"
            )

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Float32[np.ndarray, "kv_heads parts centroids width"]]:
        some = key[:, :: -(-key.shape[1] // _MOST_KEYS)]
        split = some.reshape(*some.shape[:2], self.parts, self._width(key.shape[2]))
        centroids = [[_centroids(of_head[:, part], 2**self.bits) for part in range(self.parts)] for of_head in split]
        return {_CENTROIDS: np.asarray(centroids, np.float32)}

    def fields(self, head_dim: int, key_block: int) -> Fields:
        self._width(head_dim)
        return {_CODES: Field((self.parts,), "uint8")}

    def entries(
        self, field: str, key: Float[Array, "heads runs 1 head_dim"], constants: Constants
    ) -> UInt8[Array, "heads runs parts"]:
        centroids = of_heads(required(constants, _CENTROIDS, self.name), key.shape[0])
        split = key.astype(jnp.float32).reshape(*key.shape[:2], self.parts, -1)
        nearness = jnp.einsum("hnpw,hpcw->hnpc", split, centroids) - jnp.sum(jnp.square(centroids), axis=3)[:, None] / 2
        return jnp.argmax(nearness, axis=3).astype(jnp.uint8)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        centroids = of_heads(required(constants, _CENTROIDS, self.name), query.shape[0])
        split = query.astype(jnp.float32).reshape(*query.shape[:3], self.parts, -1)
        products = jnp.einsum("hbqpw,hpcw->hbqpc", split, centroids).reshape(*query.shape[:3], -1)
        return every_query(products, present)

    def block_products(
        self, features: Float32[Array, "queries table"], index: Mapping[str, UInt8[Array, "blocks key_block parts"]]
    ) -> Float32[Array, "blocks queries"]:
        codes, tables = index[_CODES], features.T.reshape(self.parts, -1, features.shape[0])
        products = sum(jnp.take(tables[part], codes[..., part], axis=0) for part in range(self.parts))
        return jnp.max(products, axis=1)

    def _width(self, head_dim: int) -> int:
        if head_dim % self.parts:
            raise ValueError(f"parts is {self.parts}, expected a divisor of head_dim, which is {head_dim}")
        return head_dim // self.parts


def _centroids(points: Float[np.ndarray, "points width"], count: int) -> Float[np.ndarray, "{count} width"]:
    """Those of k-means, from points that lie evenly over the text; one without points stays where it was."""
    centroids = points[np.linspace(0, len(points) - 1, count).astype(int)]
    for _ in range(_ROUNDS):
        nearest = np.argmax(points @ centroids.T - np.square(centroids).sum(axis=1) / 2, axis=1)
        sizes = np.bincount(nearest, minlength=count)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, points)
        centroids = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centroids)
    return centroids
