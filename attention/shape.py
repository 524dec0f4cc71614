"""`AttentionShape`: the sizes of an attention layer, as those who time attention take it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention layer.

    Attributes:
        query_heads: heads of the queries.
        kv_heads: of keys and values, a divisor of `query_heads`.
        head_dim: width of a head.
        causal: whether a query sees only keys up to its own position.
    """

    query_heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    causal: bool = True

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.head_dim) < 1 or self.query_heads % self.kv_heads:
            raise ValueError(f"{self}: expected sizes of at least 1, and query_heads a multiple of kv_heads")
