"""`Attention`: what every strategy says of itself. `Exact`, `TwoStage` and `Values` are strategies.

A strategy is a frozen dataclass: hashable, so that jit can take it as static, and with a JSON form (`attention.plan`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Shaped

from .cache import Fields
from .keys import KeyView
from .methods import Constants
from .rows import Mask, Rows

Attended = Float[Array, "rows query_heads queries value_dim"]
"""What a call gives: in the query's dtype; 0 for a query that sees no key, and for idle rows."""


class Call(NamedTuple):
    """Queries, and what they attend to.

    Attributes:
        query: after the rotary embedding; `query_heads` is a multiple of `kv_heads`.
        keys: keys, values and index.
        rows: which slot each row attends to, and where its queries and its end lie.
        mask: which keys a query sees, and how logits are made.
        constants: what the attention was calibrated to in this layer.
    """

    query: Float[Array, "rows query_heads queries head_dim"]
    keys: KeyView
    rows: Rows
    mask: Mask = Mask()
    constants: Constants = {}  # noqa: RUF012 - read, never written


@dataclass(frozen=True)
class Attention(ABC):
    """How the queries of a call attend to the keys that they see."""

    kind: ClassVar[str]
    """The name under which the registry knows the strategy."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs the constants that `calibrate` learns."""
        return False

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Shaped[np.ndarray, "kv_heads ..."]]:
        """The constants of one layer, from its queries and keys over a calibration text."""
        return {}

    def fields(self, head_dim: int) -> Fields:
        """What it asks the cache to keep of the keys, by name: its index."""
        return {}

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What new keys add to the index, in the field of that name."""
        raise ValueError(f"{self.kind} keeps no field {field!r}")

    def within(self, capacity: int, mask: Mask) -> "Attention":
        """What this amounts to where no query sees more than `capacity` keys, and sees them by this mask."""
        return self

    @abstractmethod
    def attend(self, call: Call) -> Attended:
        """Attention in XLA, which defines what is right. Rows are settled: none is idle."""

    def objection(self, call: Call) -> str | None:
        """Why no native kernel computes this, in words; None where one does."""
        return f"there is no kernel for {self.kind}"

    def attend_in_kernel(self, call: Call) -> Attended:
        """The same by the native kernel, where there is no objection."""
        raise NotImplementedError(self.kind)


def check_power_of_two(name: str, value: int) -> None:
    """ValueError unless it is one."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} is {value}, expected a power of two")
