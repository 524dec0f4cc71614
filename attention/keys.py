"""`KeyView`: the keys and values of a call, and the one place that knows how a position becomes memory.

Memory is pages of consecutive tokens, [pages, kv_heads, page, ...]. Without a table a slot is one page as long as the
capacity, so that slot and page are the same number. With a table the pages of a slot lie anywhere, and two slots may
share one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Shaped

from .blocks import pad_axis

LEAST_PAGE = 128
"""Tokens of a page, at least; a power of two."""


class KeyView(NamedTuple):
    """What a call attends to.

    Attributes:
        key, value: keys, after the rotary embedding, and values; int8 where there are scales.
        fields: what the attention keeps of the keys, its index, by name: an entry for each token or run of tokens.
        table: the page of each slot's tokens, a page's length at a time; None where a slot is one page.
        key_scale, value_scale: what each token's int8 are multiplied by; None where keys and values are floats.
    """

    key: Float[Array, "pages kv_heads page head_dim"] | Int8[Array, "pages kv_heads page head_dim"]
    value: Float[Array, "pages kv_heads page value_dim"] | Int8[Array, "pages kv_heads page value_dim"]
    fields: Mapping[str, Shaped[Array, "pages kv_heads entries ..."]] = {}
    table: Int[Array, "slots slot_pages"] | None = None
    key_scale: Float32[Array, "pages kv_heads page"] | None = None
    value_scale: Float32[Array, "pages kv_heads page"] | None = None

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.key.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a slot may have."""
        return self.page if self.table is None else self.page * self.table.shape[1]

    def padded(self, multiple: int) -> "KeyView":
        """The same with a capacity that is a multiple, of tokens that nobody sees."""
        missing = -self.capacity % multiple
        if missing == 0:
            return self
        if self.table is not None:
            return self._replace(table=pad_axis(self.table, 1, -(-multiple // self.page)))
        return KeyView(
            pad_axis(self.key, 2, multiple),
            pad_axis(self.value, 2, multiple),
            {name: _pad_entries(x, self.page, missing) for name, x in self.fields.items()},
            None,
            *(None if x is None else pad_axis(x, 2, multiple) for x in (self.key_scale, self.value_scale)),
        )

    def key_run(
        self, slot: Array, head: Array, start: Array, size: int, dtype: DTypeLike
    ) -> Float[Array, "size head_dim"]:
        """`size` consecutive keys of one head of a slot, as `run` has it, as floats."""
        return self._run_of(self.key, self.key_scale, slot, head, start, size, dtype)

    def value_run(
        self, slot: Array, head: Array, start: Array, size: int, dtype: DTypeLike
    ) -> Float[Array, "size value_dim"]:
        """`size` consecutive values, likewise."""
        return self._run_of(self.value, self.value_scale, slot, head, start, size, dtype)

    def key_rows(
        self, slot: Array, head: Array, start: Array, dtype: DTypeLike, size: int = 1
    ) -> Float[Array, "starts size head_dim"]:
        """Runs of `size` keys of one head of a slot, as `gather` has it, as floats."""
        return self._rows_of(self.key, self.key_scale, slot, head, start, dtype, size)

    def value_rows(
        self, slot: Array, head: Array, start: Array, dtype: DTypeLike, size: int = 1
    ) -> Float[Array, "starts size value_dim"]:
        """Runs of `size` values, likewise."""
        return self._rows_of(self.value, self.value_scale, slot, head, start, dtype, size)

    def _run_of(
        self, array: Array, scale: Array | None, slot: Array, head: Array, start: Array, size: int, dtype: DTypeLike
    ) -> Array:
        scales = None if scale is None else self.run(scale, slot, head, start, size)
        return as_floats(self.run(array, slot, head, start, size), scales, dtype)

    def _rows_of(
        self, array: Array, scale: Array | None, slot: Array, head: Array, start: Array, dtype: DTypeLike, size: int
    ) -> Array:
        scales = None if scale is None else self.gather(scale, slot, head, start, size)
        return as_floats(self.gather(array, slot, head, start, size), scales, dtype)

    def run(
        self, array: Shaped[Array, "pages kv_heads entries ..."], slot: Array, head: Array, start: Array, size: int
    ) -> Shaped[Array, "size ..."]:
        """`size` consecutive entries of one of the arrays, for one head of a slot.

        Arrays keep their axes up to here: were they reshaped before the loops, XLA would copy the whole KV cache into
        each loop instead of reading it in place. With a table, start and size are powers of two or multiples of a page.
        """
        if self.table is None:
            return _slice(array, slot, head, start, size)
        page = array.shape[2]
        if size <= page:
            return _slice(array, self.table[slot, start // page], head, start % page, size)
        pages = lax.dynamic_slice(self.table, (slot, start // page), (1, size // page))[0]
        return array[pages, head].reshape(size, *array.shape[3:])

    def gather(
        self, array: Shaped[Array, "pages kv_heads page ..."], slot: Array, head: Array, start: Array, size: int = 1
    ) -> Shaped[Array, "starts size ..."]:
        """Runs of `size` tokens of one head of a slot, each from a position that is a multiple of `size`."""
        page = slot if self.table is None else self.table[slot, start // self.page]
        row = (page * self.kv_heads + head) * self.page + (start if self.table is None else start % self.page)
        return array.reshape(-1, size, *array.shape[3:])[row // size]


LARGEST = 127
"""Of the int8 of a token's key or value."""


def quantize(x: Float[Array, "... width"]) -> tuple[Int8[Array, "... width"], Float32[Array, "..."]]:
    """int8 and a scale for each token and head, whose largest component becomes 127: symmetric, 0 stays 0."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    # A denormal scale would be 0 where it is used.
    scale = jnp.where(largest > LARGEST * jnp.finfo(jnp.float32).tiny, largest / LARGEST, 1.0)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def as_floats(
    x: Shaped[Array, "... width"], scale: Float32[Array, "..."] | None, dtype: DTypeLike
) -> Float[Array, "... width"]:
    """What `quantize` stored; x itself where it has no scale."""
    return x if scale is None else (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def _slice(array: Array, page: Array, head: Array, start: Array, size: int) -> Array:
    rest = array.shape[3:]
    return lax.dynamic_slice(array, (page, head, start, *(0,) * len(rest)), (1, 1, size, *rest))[0, 0]


def _pad_entries(array: Array, page: int, missing: int) -> Array:
    """With the entries of `missing` more tokens."""
    entries = -(-(page + missing) * array.shape[2] // page)
    return pad_axis(array, 2, entries) if entries > array.shape[2] else array


def runs_of(x: Float[Array, "pages kv_heads page width"], size: int) -> Float[Array, "heads runs size width"]:
    """Tokens cut into runs, of all pages and heads; zeros fill up the last one."""
    x = pad_axis(x, 2, size)
    return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[3])


def as_index(
    entries: Shaped[Array, "heads entries ..."], key: Shaped[Array, "pages kv_heads page head_dim"]
) -> Shaped[Array, "pages kv_heads entries ..."]:
    """Entries of all heads as the cache holds them."""
    return jnp.reshape(entries, (*key.shape[:2], *entries.shape[1:]))
