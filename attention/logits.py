"""How a logit is made of a query and a key: the product, scaled, capped, and biased by their distance."""

import math
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from .ops import cap, matmul_transposed
from .relative_bias import BiasTable, bias_tile, table_of_heads
from .rows import Mask


class Logits(NamedTuple):
    """Makes logits, of one KV head once `of_head` has chosen it.

    Attributes:
        scale: factor of query . key.
        softcap: cap of the logits, or None.
        bias: relative position bias of the head's query heads, or of all; None for none.
    """

    scale: float
    softcap: float | None
    bias: BiasTable | Float[Array, "kv_heads group distances"] | None

    @classmethod
    def of(cls, mask: Mask, head_dim: int, kv_heads: int) -> "Logits":
        """As the mask says."""
        return cls(scale_of(mask, head_dim), mask.softcap, table_of_heads(mask.relative_bias, kv_heads))

    def of_head(self, head: Int[Array, ""]) -> "Logits":
        """Of one KV head."""
        return self if self.bias is None else self._replace(bias=self.bias[head])

    def __call__(
        self,
        query: Float[Array, "lanes head_dim"],
        key: Float[Array, "keys head_dim"],
        query_start: Int[Array, ""],
        key_start: Int[Array, ""],
    ) -> Float[Array, "lanes keys"]:
        """Logits of consecutive queries (of a whole group) and consecutive keys."""
        logits = cap(matmul_transposed(query, key) * self.scale, self.softcap)
        if self.bias is None:
            return logits
        queries = query.shape[0] // self.bias.shape[0]
        return logits + bias_tile(self.bias, query_start, key_start, queries, key.shape[0])


def scale_of(mask: Mask, head_dim: int) -> float:
    """The factor of query . key."""
    return 1.0 / math.sqrt(head_dim) if mask.scale is None else mask.scale
