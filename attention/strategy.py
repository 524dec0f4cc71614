"""`Attention`: what every strategy says of itself. `Exact`, `TwoStage`, `DecodeSelection` and `Values` are strategies.

A strategy is a frozen dataclass: hashable, so that jit can take it as static, and with a JSON form (`attention.plan`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .cache import Fields, State, emptied
from .keys import KeyView, as_floats, as_index, runs_of
from .methods import Constants, Method
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
        state: what the attention keeps of each slot; empty where there is no cache.
    """

    query: Float[Array, "rows query_heads queries head_dim"]
    keys: KeyView
    rows: Rows
    mask: Mask = Mask()
    constants: Constants = {}  # noqa: RUF012 - read, never written
    state: State = {}  # noqa: RUF012 - likewise


@dataclass(frozen=True)
class Attention(ABC):
    """How the queries of a call attend to the keys that they see."""

    kind: ClassVar[str]
    """The name under which the registry knows the strategy."""
    pure: ClassVar[bool] = True
    """Whether tracing it has no other effect than to compute, so that layers that are alike are traced once."""

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

    def state(self, kv_heads: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What it asks the cache to keep of each slot from one call to the next, by name."""
        return {}

    def renewed(self, call: Call, *, in_kernel: bool) -> State:
        """The state that a call attends with and leaves, by a native kernel or in XLA. Rows may be idle.

        Nothing is left of a call's rows, if not said otherwise: what was kept belongs to the tokens before.
        """
        return emptied(call.state, call.rows.slot)

    @property
    def rule(self) -> object:
        """What decides its constants and its index: strategies of equal rules share them."""
        return self

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What new keys, or values where the field is made of those, add to the index, in the field of that name."""
        raise ValueError(f"{self.kind} keeps no field {field!r}")

    def of_layer(self, layer: int) -> "Attention":
        """What this amounts to in a layer, counted from 0."""
        return self

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


class Selective(Attention):
    """An attention that ranks key blocks by a method, which its constants and its index belong to."""

    method: Method | str
    key_block: int

    @property
    def ranking(self) -> Method:
        """The method, which may be given by name but is always held as an object."""
        assert isinstance(self.method, Method)
        return self.method

    @property
    def rule(self) -> Method:
        """The method. How many queries it ranks by changes nothing of what it keeps of the keys."""
        return self.ranking.with_every_query

    @property
    def calibrated(self) -> bool:
        """Whether the method is."""
        return self.ranking.calibrated

    def calibrate(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> dict[str, Shaped[np.ndarray, "kv_heads ..."]]:
        """The constants of the method."""
        return self.ranking.calibrate(query, key)

    def fields(self, head_dim: int) -> Fields:
        """The index of the method."""
        return self.ranking.fields(head_dim, self.key_block)

    def entries(
        self, field: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What new keys add to the method's index."""
        return self.ranking.entries(field, key, constants)

    def indexed(self, keys: KeyView, constants: Constants) -> KeyView:
        """The keys with the index, which is made here where no cache has kept it."""
        missing = {name: field for name, field in self.fields(keys.key.shape[3]).items() if name not in keys.fields}

        def made(name: str) -> Array:
            of_values = missing[name].of_values
            kept, scale = (keys.value, keys.value_scale) if of_values else (keys.key, keys.key_scale)
            runs = runs_of(as_floats(kept, scale, jnp.float32), missing[name].tokens)
            return as_index(self.entries(name, runs, constants), kept)

        return keys._replace(fields={**keys.fields, **{name: made(name) for name in missing}})


def check_power_of_two(name: str, value: int) -> None:
    """ValueError unless it is one."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} is {value}, expected a power of two")
