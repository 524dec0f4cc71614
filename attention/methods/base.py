"""What a selection method is: a cheap score that ranks key blocks for a query block.

A method gives, for every query and key block, an estimate of the largest logit that the query has inside the block. It
does so from its index, which it makes of the keys once, when they enter the cache, and from its constants, which it
learned from a calibration text. Masks, normalisation, forced blocks and everything after are shared by all methods (see
`attention.selection`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from ..cache import Fields
from ..ops import matmul_transposed

Constants = Mapping[str, Shaped[Array, "kv_heads ..."]]
"""What calibration learned of a layer, by name."""


class RankingQueries(NamedTuple):
    """What stage 1 knows of the queries of every block: features of some or all of them, the factor that makes a logit
    of a feature product, and whether each is a token of its row: the others, which fill up a block, rank nothing."""

    features: Shaped[Array, "heads query_blocks ranking_queries features"]
    scale: Float32[Array, "heads query_blocks ranking_queries"]
    present: Bool[Array, "heads query_blocks ranking_queries"]
    lane: Int[Array, "heads query_blocks ranking_queries"]
    """Which query of its block each one is."""


@dataclass(frozen=True)
class Method(ABC):
    """A stage-1 rule. Subclasses are frozen dataclasses: their fields are the method's options."""

    name: ClassVar[str]
    """The name under which the registry knows the method."""
    source: ClassVar[str]
    """Where it is published."""
    calibrated: ClassVar[bool] = False
    """Whether the method needs what `calibrate` gives."""
    estimates: ClassVar[bool] = True
    """Whether its products estimate logits, so that a mass can be made of them; others only rank."""
    single_queries: ClassVar[bool] = True
    """Whether it ranks for a new token, and not only for a block of queries."""
    key_block: ClassVar[int] = 8
    """Keys that decoding ranks together, unless it is told otherwise."""

    @property
    def with_every_query(self) -> "Method":
        """The same, with all queries of a block in stage 1. Methods that agree in this share index and constants."""
        return self

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Shaped[np.ndarray, "kv_heads ..."]]:
        """The constants of one layer, from its queries and keys over a calibration text."""
        return {}

    @abstractmethod
    def fields(self, head_dim: int, key_block: int) -> Fields:
        """The index by name; its entries stand for as many tokens as divide a key block, or for whole key blocks."""

    @abstractmethod
    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What the index keeps, in the field of that name, of each run of tokens; `heads` counts through rows and KV
        heads."""

    @abstractmethod
    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        constants: Constants,
    ) -> RankingQueries:
        """What stage 1 keeps of each query block, of which `present` says which queries are tokens of their row."""

    def offsets(
        self, query: Float[Array, "heads query_blocks queries head_dim"], constants: Constants
    ) -> Float32[Array, "heads query_blocks queries"]:
        """What all estimates for a query lack, before the logits' scale. It plays no part in a ranking, but where they
        are compared with exact logits."""
        return jnp.zeros(query.shape[:3], jnp.float32)

    @abstractmethod
    def block_products(
        self,
        features: Shaped[Array, "ranking_queries features"],
        index: Mapping[str, Shaped[Array, "spans entries ..."]],
    ) -> Float32[Array, "parts ranking_queries"]:
        """The estimated largest product of each query with a key of each block, before `RankingQueries.scale`.

        Args:
            features: of the queries.
            index: entries by key block, or one by one where they stand for more than a block.

        Returns:
            Products with each block, or with equal parts of it, of which the largest counts.
        """


def every_lane(query: Shaped[Array, "heads query_blocks queries _"]) -> Int[Array, "heads query_blocks queries"]:
    """`RankingQueries.lane` where all queries of a block rank."""
    return jnp.broadcast_to(jnp.arange(query.shape[2], dtype=jnp.int32), query.shape[:3])


def every_query(
    features: Shaped[Array, "heads query_blocks queries features"],
    present: Bool[Array, "heads query_blocks queries"],
    scale: Float32[Array, "heads query_blocks queries"] | None = None,
) -> RankingQueries:
    """All queries of each block by their features, whose products are logits but for a scale, if there is one."""
    scale = jnp.ones(features.shape[:3], jnp.float32) if scale is None else scale
    return RankingQueries(features, scale, present, every_lane(features))


def largest_products(
    entries: Shaped[Array, "blocks *entries features"], features: Float[Array, "queries features"]
) -> Float32[Array, "blocks queries"]:
    """The largest product of each query with an entry of each block."""
    blocks, width = entries.shape[0], entries.shape[-1]
    products = matmul_transposed(entries.reshape(-1, width).astype(features.dtype), features)
    return jnp.max(products.reshape(blocks, -1, features.shape[0]), axis=1)


def of_heads(constant: Shaped[Array, "kv_heads ..."], heads: int) -> Shaped[Array, "heads ..."]:
    """A constant for heads that are counted through rows and KV heads."""
    return jnp.tile(constant, (heads // constant.shape[0], *(1,) * (constant.ndim - 1)))


def required(constants: Constants, name: str, method: str) -> Array:
    """A constant by name.

    Raises:
        ValueError: it is not among them.
    """
    if name not in constants:
        raise ValueError(f"{method} needs the constant {name}: pass constants=, as its calibrate makes them")
    return constants[name]
