"""The KV cache: the arrays of each layer by name, explicit in every call and donated by the caller.

A layer holds keys and values, and whatever the attention keeps of its keys (`Field`) and of each slot (`State`). A
layer with a sliding window holds a ring: the last tokens of each row, the one at position p in place p % ring. Keys and
values may be int8, with a scale for each token and head beside them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .keys import KeyView, quantize
from .rows import Mask, Rows

LayerCache = dict[str, Array]
"""`key` and `value` [pages, kv_heads, page, width], where they are int8 also `key_scale` and `value_scale` [pages,
kv_heads, page], fields [pages, kv_heads, entries, ...] and state [slots, ...] by their names."""
KVCache = tuple[LayerCache, ...]


@dataclass(frozen=True)
class Field:
    """An array that an attention asks a layer's cache to keep of the keys, or of the values.

    Attributes:
        shape: of an entry.
        dtype: its name.
        tokens: consecutive tokens, a power of two up to a page, for which there is one entry for each KV head.
        of_values: whether entries are made of values instead of keys.
    """

    shape: tuple[int, ...]
    dtype: str
    tokens: int = 1
    of_values: bool = False


Fields = Mapping[str, Field]
Entries = Callable[[str, Float[Array, "heads runs tokens head_dim"]], Shaped[Array, "heads runs ..."]]
"""Makes the entries of a field, by its name, from runs of as many tokens as an entry stands for."""


State = Mapping[str, Shaped[Array, "slots ..."]]
"""What an attention keeps of each slot from one call to the next, by name. Zeros stand for nothing."""


class Extended(NamedTuple):
    """A layer's cache with the tokens of a call in it, and how these attend to it."""

    cache: LayerCache
    keys: KeyView
    rows: Rows
    mask: Mask


def extend(
    cache: LayerCache,
    key: Float[Array, "rows kv_heads tokens head_dim"],
    value: Float[Array, "rows kv_heads tokens value_dim"],
    rows: Rows,
    mask: Mask,
    fields: Fields,
    entries: Entries,
    table: Int[Array, "slots slot_pages"] | None = None,
    state: Collection[str] = (),
) -> Extended:
    """Puts the tokens of a call at positions `offset .. offset + tokens` of their slots. Idle rows write nothing.

    The caller sees to it that `offset + tokens <= capacity`: past the end, XLA would move the write back.

    Args:
        cache: of one layer; a ring where the mask has a window.
        key, value: of the new tokens.
        rows: of the call.
        mask: of the layer.
        fields: what is kept besides, in a layer without a window.
        entries: makes it.
        table: the pages of each slot; None where a slot is one page. Rings have none.
        state: names of what is kept of each slot, in a layer without a window. It stays as it is.

    Raises:
        ValueError: the cache has other arrays, or arrays of another dtype than what is written to them.
    """
    new = _stored(cache, key, value)
    if mask.window is not None:
        _check(cache, new, {}, ())
        return _extend_ring(cache, new, rows, mask)
    _check(cache, new, fields, state)
    cache = dict(cache)
    for name, update in new.items():
        cache[name] = _put(cache[name], update, rows.slot, rows.offset, table)
    keys = _view(cache, table)
    for name, field in fields.items():
        start, runs = _runs(keys, value if field.of_values else key, rows, field)
        cache[name] = _put(cache[name], _as_entries(entries(name, runs), key), rows.slot, start, table)
    return Extended(cache, keys._replace(fields={name: cache[name] for name in fields}), rows, mask)


def put_state(state: State, slot: Int[Array, " rows"], new: Mapping[str, Shaped[Array, "rows ..."]]) -> State:
    """The state with what is new of each row's slot. Rows of slot -1 write nothing."""
    # An index past the end, which a negative one would not be, is dropped.
    return {name: x.at[jnp.where(slot < 0, x.shape[0], slot)].set(new[name], mode="drop") for name, x in state.items()}


def emptied(state: State, slot: Int[Array, " rows"]) -> State:
    """The state with nothing of each row's slot."""
    return put_state(state, slot, {name: jnp.zeros((*slot.shape, *x.shape[1:]), x.dtype) for name, x in state.items()})


def _stored(cache: LayerCache, key: Array, value: Array) -> dict[str, Array]:
    """New keys and values as the cache holds them."""
    if "key_scale" not in cache:
        return {"key": key, "value": value}
    (keys, key_scale), (values, value_scale) = quantize(key), quantize(value)
    return {"key": keys, "value": values, "key_scale": key_scale, "value_scale": value_scale}


def _check(cache: LayerCache, new: Mapping[str, Array], fields: Fields, state: Collection[str]) -> None:
    if cache.keys() != {*new, *fields, *state}:
        raise ValueError(f"the cache has {', '.join(cache)}, expected {', '.join((*new, *fields, *state))}")
    written = {name: x.dtype for name, x in new.items()} | {name: field.dtype for name, field in fields.items()}
    for name, dtype in written.items():
        if cache[name].dtype != dtype:
            raise ValueError(f"the cache's {name} is {cache[name].dtype}, and what is written to it is {dtype}")


def _put(buffer: Array, update: Array, slot: Array, start: Array, table: Array | None) -> Array:
    """Writes a run of entries of each row, from `start` on, and leaves what idle rows point to as it is."""
    # Row by row, because one batched update with an offset per row becomes a scatter, which copies the buffer.
    for row in range(update.shape[0]):
        if table is None:
            buffer = _put_run(buffer, update[row], slot[row], start[row], slot[row] >= 0)
        else:
            buffer = _put_pages(buffer, update[row], slot[row] >= 0, table[slot[row]], start[row])
    return buffer


def _put_run(
    buffer: Array, update: Array, page: Array, start: Array, mine: Bool[Array, ""] | Bool[Array, " entries"]
) -> Array:
    """Writes entries of one page where they are the row's, and what is there already where they are not."""
    at = (jnp.maximum(page, 0), 0, start, *(0,) * (buffer.ndim - 3))
    before = lax.dynamic_slice(buffer, at, (1, *update.shape))
    mine = mine.reshape(-1, *(1,) * (buffer.ndim - 3))
    return lax.dynamic_update_slice(buffer, jnp.where(mine, update, before), at)


def _put_pages(buffer: Array, update: Array, busy: Array, pages: Array, start: Array) -> Array:
    """A run that may cross from page to page, each of which gets its part."""
    page, count = buffer.shape[2], update.shape[1]
    number, within = start // page, start % page
    if count == 1:
        return _put_run(buffer, update, pages[number], within, busy)
    parts = -(-(count - 1) // page) + 1
    aligned = jnp.zeros((update.shape[0], parts * page, *update.shape[2:]), update.dtype)
    aligned = lax.dynamic_update_slice_in_dim(aligned, update, within, axis=1)
    place = jnp.arange(page)
    for part in range(parts):
        piece = aligned[:, part * page : (part + 1) * page]
        mine = busy & (place + part * page >= within) & (place + part * page < within + count)
        # Behind the last page stands nothing of the run.
        buffer = _put_run(buffer, piece, pages[jnp.minimum(number + part, pages.shape[0] - 1)], jnp.int32(0), mine)
    return buffer


def _runs(keys: KeyView, new: Array, rows: Rows, field: Field) -> tuple[Array, Array]:
    """The runs of tokens whose entries change, [heads, runs, tokens, width], and where they begin, in entries.

    Entries of single tokens come from the new keys or values alone, others from the cache: a run may have begun in an
    earlier call. What a run holds of tokens that are yet to come means nothing until they are there.
    """
    tokens, (count, kv_heads, length, width) = field.tokens, new.shape
    if tokens == 1:
        return rows.offset, new.reshape(count * kv_heads, length, 1, width)
    span = min(-(-(length - 1) // tokens) + 1, keys.capacity // tokens)
    start = jnp.clip(rows.offset // tokens, 0, keys.capacity // tokens - span)
    position = (start[:, None] + jnp.arange(span)) * tokens
    read = keys.value_rows if field.of_values else keys.key_rows
    heads = [
        read(jnp.maximum(rows.slot[row], 0), jnp.int32(head), position[row], new.dtype, tokens)
        for row in range(count)
        for head in range(kv_heads)
    ]
    return start, jnp.stack(heads)


def _as_entries(entries: Array, key: Array) -> Array:
    return entries.reshape(*key.shape[:2], *entries.shape[1:])


def _extend_ring(cache: LayerCache, new: Mapping[str, Array], rows: Rows, mask: Mask) -> Extended:
    if mask.relative_bias is not None:
        raise ValueError(
            "a layer with a sliding window and a relative position bias has no cache: its ring has no order"
        )
    ring, (count, _, tokens, _) = cache["key"].shape[2], new["key"].shape
    busy = rows.settled()
    if tokens == 1:
        # All that a ring holds is in the window, so that its order does not matter.
        place = rows.offset % ring
        written = {name: _put(cache[name], x, rows.slot, place, None) for name, x in new.items()}
        seen = Rows(rows.slot, jnp.zeros_like(rows.offset), jnp.minimum(rows.offset + 1, ring))
        return Extended(written, _view(written), seen, mask._replace(causal=False, window=None))
    first = jnp.maximum(busy.offset - ring, 0)
    end = jnp.minimum(busy.offset + tokens, busy.length)
    last = jnp.maximum(end - ring, 0)
    kept, views = dict(cache), {}
    for name, update in new.items():
        lines = []
        for row in range(count):
            old = lax.dynamic_index_in_dim(cache[name], busy.slot[row], 0, keepdims=False)
            line = jnp.concatenate([_rotated(old, first[row] % ring), jnp.zeros_like(update[row])], axis=1)
            line = lax.dynamic_update_slice_in_dim(line, update[row], busy.offset[row] - first[row], axis=1)
            latest = lax.dynamic_slice_in_dim(line, last[row] - first[row], ring, axis=1)
            latest = _rotated(latest, (-last[row]) % ring)
            kept[name] = _put_run(kept[name], latest, rows.slot[row], jnp.int32(0), rows.slot[row] >= 0)
            lines.append(line)
        views[name] = jnp.stack(lines)
    # The call attends to what the ring held and its own tokens, in their order.
    here = jnp.where(rows.slot >= 0, jnp.arange(count, dtype=jnp.int32), -1)
    return Extended(kept, _view(views), Rows(here, busy.offset - first, busy.length - first), mask)


def _view(cache: LayerCache, table: Array | None = None) -> KeyView:
    return KeyView(cache["key"], cache["value"], {}, table, cache.get("key_scale"), cache.get("value_scale"))


def _rotated(x: Array, by: Array) -> Array:
    """x with its second axis begun at `by`."""
    return lax.dynamic_slice_in_dim(jnp.concatenate([x, x], axis=1), by, x.shape[1], axis=1)
