"""IceFormer's prioritised search: the key of the largest product with a query becomes its nearest neighbour, and random
projections tell who may be near.

Source: Mao, Ester, Li (ICLR 2024, arXiv 2405.02842), after Prioritized DCI (Li and Malik, arXiv 1703.00440). With
c >= |k| for all keys, k becomes [k / c; sqrt(1 - |k|^2 / c^2)] and q becomes [q / |q|; 0], both of norm 1. On each of
L x m random unit directions u a key lies at a distance |u . (q' - k')| from the query. A key is visited when it has
come up in all m simple indices of one of the L composite ones: the order of visits is that of the smallest over L of
the largest over m of these distances, which is the priority here. Of the visited keys those of the largest exact
products are the neighbours: stage 2.

A key block keeps the range of its keys' projections, and its distance is that of the query to the range. With key
blocks and query blocks of one token this is the search as published, for each query by itself:

    TwoStage("iceformer", budget=20, candidates=10, query_block=1, key_block=1, sink=0, local=0, exact_last_block=False)

c comes from a calibration text, with room above its longest key; a longer one counts as if it were as long as c.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from ..cache import Field, Fields
from .base import Constants, Method, RankingQueries, every_query, of_heads, required

_RANGES, _LONGEST = "projection_ranges", "longest_key"
_ROOM = 1.1


@dataclass(frozen=True)
class Iceformer(Method):
    """Ranks a key block by how near the range of its keys' random projections comes to a query's.

    Attributes:
        composites: composite indices, L: a key need only be near in one of them.
        simples: directions of each, m: a key must be near in all of them.
        seed: of the directions.
    """

    name: ClassVar[str] = "iceformer"
    source: ClassVar[str] = "IceFormer, arXiv 2405.02842"
    calibrated: ClassVar[bool] = True
    estimates: ClassVar[bool] = False
    key_block: ClassVar[int] = 1

    composites: int = 2
    simples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.composites < 1 or self.simples < 1:
            raise ValueError(f"composites is {self.composites} and simples is {self.simples}, expected at least 1")

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Float32[np.ndarray, " kv_heads"]]:
        return {_LONGEST: _ROOM * np.linalg.norm(key, axis=2).max(axis=1).astype(np.float32)}

    def fields(self, head_dim: int, key_block: int) -> Fields:
        return {_RANGES: Field((2, self.composites * self.simples), "float32", key_block)}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Float32[Array, "heads runs 2 directions"]:
        longest = of_heads(required(constants, _LONGEST, self.name), key.shape[0])[:, None, None, None]
        lifted = key.astype(jnp.float32) / jnp.maximum(longest, jnp.finfo(jnp.float32).tiny)
        norm = jnp.sqrt(jnp.sum(jnp.square(lifted), axis=-1, keepdims=True))
        lifted = lifted / jnp.maximum(norm, 1)
        rest = jnp.sqrt(jnp.maximum(1 - jnp.square(norm), 0))
        projected = jnp.concatenate([lifted, rest], axis=-1) @ self._directions(key.shape[3])
        return jnp.stack([jnp.min(projected, axis=2), jnp.max(projected, axis=2)], axis=2)

    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        wide = query.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True))
        projected = (wide / jnp.where(norm > 0, norm, 1)) @ self._directions(query.shape[3])[:-1]
        return every_query(projected, present)

    def block_products(
        self,
        features: Float32[Array, "queries directions"],
        index: Mapping[str, Float32[Array, "blocks 1 2 directions"]],
    ) -> Float32[Array, "blocks queries"]:
        least, most = jnp.moveaxis(index[_RANGES][:, 0], 1, 0)[:, :, None]
        distance = jnp.maximum(jnp.maximum(least - features, features - most), 0)
        of_composite = jnp.max(distance.reshape(*distance.shape[:2], self.composites, self.simples), axis=3)
        return -jnp.min(of_composite, axis=2)

    def _directions(self, head_dim: int) -> Float32[np.ndarray, "lifted directions"]:
        """Unit vectors of the lifted space, seeded."""
        shape = head_dim + 1, self.composites * self.simples
        directions = np.random.default_rng(self.seed).standard_normal(shape, np.float32)
        return directions / np.linalg.norm(directions, axis=0)
