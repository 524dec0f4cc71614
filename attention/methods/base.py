"""What a selection method is: a cheap score that ranks key blocks for a query block.

A method sees keys as [blocks, key_block, head_dim] and gives, for every query and key block, an estimate of the largest
logit that the query has inside the block. Masks, normalisation, forced blocks and everything after are shared by all
methods (see `attention.selection`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Shaped


class RankingQueries(NamedTuple):
    """What stage 1 knows of the queries of every block: features of some or all of them, the factor that makes a logit
    of a feature product, and whether each is a token of its row: the others, which fill up a block, rank nothing."""

    features: Shaped[Array, "heads query_blocks ranking_queries features"]
    scale: Float32[Array, "heads query_blocks ranking_queries"]
    present: Bool[Array, "heads query_blocks ranking_queries"]


@dataclass(frozen=True)
class Method(ABC):
    """A stage-1 rule. Subclasses are frozen dataclasses: their fields are the method's options."""

    name: ClassVar[str]
    """The name under which the registry knows the method."""
    needs_basis: ClassVar[bool] = False
    """Whether the method needs what `calibrate` gives."""

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> Float[np.ndarray, "kv_heads 2 head_dim rank"]:
        """Projections of queries and keys for one layer, from its queries and keys over a calibration text."""
        raise NotImplementedError(f"{self.name} has nothing to calibrate")

    @abstractmethod
    def summarize(
        self,
        key: Float[Array, "heads blocks key_block head_dim"],
        basis: Float[Array, "heads 2 head_dim rank"] | None,
    ) -> Shaped[Array, "heads blocks ..."]:
        """What stage 1 keeps of each key block."""

    @abstractmethod
    def ranking_queries(
        self,
        query: Float[Array, "heads query_blocks queries head_dim"],
        present: Bool[Array, "heads query_blocks queries"],
        basis: Float[Array, "heads 2 head_dim rank"] | None,
    ) -> RankingQueries:
        """What stage 1 keeps of each query block, of which `present` says which queries are tokens of their row."""

    @abstractmethod
    def block_products(
        self, features: Shaped[Array, "ranking_queries features"], summary: Shaped[Array, "blocks ..."]
    ) -> Float32[Array, "blocks ranking_queries"]:
        """The estimated largest product of each query with a key of each block, before `RankingQueries.scale`."""
