"""The benchmark's floor: values in place of attention, so that only the dense layers' work is left."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from .keys import KeyView
from .methods import Constants
from .rows import Mask, Rows
from .strategy import Attention


@dataclass(frozen=True)
class Values(Attention):
    """Gives each query the value of its own token. Its results mean nothing; its time is what attention adds to."""

    kind: ClassVar[str] = "values"

    def attend(
        self,
        query: Float[Array, "rows query_heads queries head_dim"],
        keys: KeyView,
        rows: Rows,
        mask: Mask,
        constants: Constants,
    ) -> Float[Array, "rows query_heads queries value_dim"]:
        queries, group = query.shape[2], query.shape[1] // keys.kv_heads
        position = rows.offset[:, None] + jnp.arange(queries)
        gathered = [
            keys.gather(keys.value, rows.slot[row], jnp.int32(head), position[row])[:, 0]
            for row in range(query.shape[0])
            for head in range(keys.kv_heads)
        ]
        values = jnp.stack(gathered).reshape(query.shape[0], keys.kv_heads, queries, -1)
        return jnp.repeat(values, group, axis=1)
