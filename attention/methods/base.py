"""What a selection method is: a cheap score that ranks key blocks for a query block.

A method sees keys as [blocks, key_block, head_dim] and gives, for every query and key block, an estimate of the largest
logit that the query has inside the block. Masks, normalisation, forced blocks and everything after are shared by all
methods (see `attention.selection`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Method(ABC):
    """A stage-1 rule. Subclasses are frozen dataclasses: their fields are the method's options."""

    name: ClassVar[str]
    """The name under which the registry knows the method."""
    needs_basis: ClassVar[bool] = False
    """Whether `summarize` and `project` need what `calibrate` gives."""

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
    ) -> Float[Array, "heads blocks ..."]:
        """What stage 1 keeps of each key block."""

    @abstractmethod
    def project(
        self, query: Float[Array, "queries head_dim"], basis: Float[Array, "2 head_dim rank"] | None
    ) -> Float[Array, "ranking_queries features"]:
        """What stage 1 keeps of a query block: the features of some or all of its queries."""

    @abstractmethod
    def block_logits(
        self, query: Float[Array, "ranking_queries features"], summary: Float[Array, "blocks ..."]
    ) -> Float[Array, "blocks ranking_queries"]:
        """The estimated largest logit of each query in each key block, in float32 and before scaling."""
