"""The benchmark's floor: values in place of attention, so that only the dense layers' work is left."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from .strategy import Attended, Attention, Call


@dataclass(frozen=True)
class Values(Attention):
    """Gives each query the value of its own token. Its results mean nothing; its time is what attention adds to."""

    kind: ClassVar[str] = "values"

    def attend(self, call: Call) -> Attended:
        query, keys, rows, _, *_ = call
        queries, group = query.shape[2], query.shape[1] // keys.kv_heads
        position = rows.offset[:, None] + jnp.arange(queries)
        gathered = [
            keys.value_rows(rows.slot[row], jnp.int32(head), position[row], query.dtype)[:, 0]
            for row in range(query.shape[0])
            for head in range(keys.kv_heads)
        ]
        values = jnp.stack(gathered).reshape(query.shape[0], keys.kv_heads, queries, -1)
        return jnp.repeat(values, group, axis=1)
