"""What a call of attention says of its rows, and of how queries meet keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rows(NamedTuple):
    """The rows of one call, which need not be the rows of the memory that they attend to.

    Attributes:
        slot: which row of the cache each row of the call is; -1 for an idle row, which reads and writes nothing, and
            whose output is 0.
        offset: position of each row's first token in this call.
        length: tokens of each whole row, those before and after this call included.
    """

    slot: Int[Array, " rows"]
    offset: Int[Array, " rows"]
    length: Int[Array, " rows"]

    @classmethod
    def whole(cls, length: Int[Array, " rows"]) -> "Rows":
        """Rows that lie in memory as in the call, all of whose tokens are in this call."""
        return cls(jnp.arange(length.shape[0], dtype=jnp.int32), jnp.zeros_like(length), length)

    def settled(self) -> "Rows":
        """The same, with idle rows as rows of no tokens in slot 0: nothing of them is computed."""
        busy = self.slot >= 0
        return Rows(*(jnp.where(busy, x, 0).astype(jnp.int32) for x in self))


class Mask(NamedTuple):
    """Which keys a query sees, and what makes a logit of a query and a key.

    Attributes:
        causal: whether a query sees only keys up to its own position.
        window: sliding window, in tokens: a query at position i sees key j only if |i - j| < window, which with
            `causal` are the `window` keys up to its own. None sees all. The `sliding_window` of transformers' causal
            models is this number; bidirectional ModernBERT has |i - j| <= local_attention // 2, a window of
            local_attention // 2 + 1.
        scale: factor of query . key; None for 1 / sqrt(head_dim).
        softcap: cap of the logits (Gemma 2), applied after the scale and before the masks; None for none.
        relative_bias: relative position bias, added to the logits after the cap: the value at
            `reach + key position - query position` of the 2 * reach + 1 that each head has, where distances beyond the
            reach count as the reach (T5). None for none.
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    relative_bias: Float[Array, "query_heads distances"] | None = None
