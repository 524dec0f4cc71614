"""A bias of the logits by the distance between key and query, as T5 has for positions.

The table holds a value for each distance `key - query` from -reach to reach; keys that are farther away have that of
the largest distance. Tiles of consecutive queries and keys are cut from it, so that no array grows with the square of
the length.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BiasTable = Float[Array, "group distances"]
"""The bias of the query heads that share a KV head, by `reach + distance`."""


def table_of_heads(
    bias: Float[Array, "query_heads distances"] | None, kv_heads: int
) -> Float[Array, "kv_heads group distances"] | None:
    """The table of each KV head in float32; None for none.

    Raises:
        ValueError: an even number of distances, so that none is in the middle.
    """
    if bias is None:
        return None
    if bias.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias has {bias.shape[1]} distances, expected an odd number: from -reach to reach, with 0"
        )
    return bias.astype(jnp.float32).reshape(kv_heads, -1, bias.shape[1])


def bias_tile(
    table: BiasTable, query_start: Int[Array, ""], key_start: Int[Array, ""], queries: int, keys: int
) -> Float[Array, "rows keys"]:
    """The bias of consecutive queries of a group, group-major, at consecutive keys.

    A tile has only `queries + keys - 1` different distances. They are looked up once and repeated with a period that is
    longer by one than a row of the result, which shifts each row by one against that before.
    """
    group, reach, period = table.shape[0], table.shape[1] // 2, queries + keys
    index = jnp.arange(period, dtype=jnp.int32)
    distance = key_start - query_start + jnp.where(index < keys, index, index - period)
    values = table[:, jnp.clip(distance, -reach, reach) + reach]
    shifted = jnp.tile(values, (1, queries))[:, : queries * (period - 1)].reshape(group, queries, period - 1)
    return shifted[:, :, :keys].reshape(group * queries, keys)
