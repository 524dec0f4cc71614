"""Copying a run of a slot's tokens out of a bucket's KV cache, and back, on the host.

The arrays of a layer are [pages, heads, entries, ...]; an entry stands for one token or for a run of them. A layer with
a sliding window keeps a ring of its last tokens, which is copied whole. What is kept of each slot besides its tokens is
not copied: a prompt begins without.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import ArrayInfo, CacheInfo

Layers = tuple[dict[str, NDArray[Any]], ...]
"""Arrays of each layer, by name."""


def copy_out(cache: Layers, info: CacheInfo, slot: int, pages: Sequence[int], start: int, end: int) -> Layers:
    """What the cache holds of tokens `start .. end` of a slot, after a call that ended at `end`.

    Args:
        cache: of a bucket.
        info: its layout.
        slot: whose tokens.
        pages: of the slot, in the order of its tokens; only the slot itself where a slot is one page.
        start, end: positions of the first token and of the one behind the last.

    Returns:
        Of each layer, the arrays' entries as [heads, entries, ...]; of a ring all of it.
    """

    def layer(arrays: Mapping[str, NDArray[Any]], window: int) -> dict[str, NDArray[Any]]:
        if window:
            return {name: array[slot].copy() for name, array in arrays.items()}
        return {
            name: np.concatenate([array[part] for part in _parts(arrays, name, pages, start, end)], axis=1)
            for name, array in arrays.items()
            if name not in info.state
        }

    return tuple(layer(arrays, window) for arrays, window in zip(cache, info.windows, strict=True))


def copy_in(
    cache: Layers, info: CacheInfo, slot: int, pages: Sequence[int], start: int, end: int, kept: Layers
) -> None:
    """Puts back what `copy_out` gave, into any slot. Runs of one sequence are put back in their order."""
    for arrays, window, saved in zip(cache, info.windows, kept, strict=True):
        for name, entries in saved.items():
            if window:
                arrays[name][slot] = entries
                continue
            taken = 0
            for part in _parts(arrays, name, pages, start, end):
                count = arrays[name][part].shape[1]
                arrays[name][part] = entries[:, taken : taken + count]
                taken += count


def copy_ring_places(cache: Layers, info: CacheInfo, slot: int, positions: range) -> Layers:
    """What the rings of a slot hold where some positions go, [heads, positions, ...]; nothing of other layers."""
    return tuple(
        {name: array[slot][:, _places(positions, window)] for name, array in arrays.items()} if window else {}
        for arrays, window in zip(cache, info.windows, strict=True)
    )


def restore_ring_places(cache: Layers, info: CacheInfo, slot: int, positions: range, kept: Layers) -> None:
    """Puts back what `copy_ring_places` gave, of the last of its positions if these are fewer."""
    for arrays, window, saved in zip(cache, info.windows, kept, strict=True):
        for name, entries in saved.items():
            first = entries.shape[1] - len(positions)
            arrays[name][slot][:, _places(positions, window)] = entries[:, first:]


def _places(positions: range, window: int) -> list[int]:
    return [position % window for position in positions]


def run_arrays(info: CacheInfo, start: int, end: int) -> tuple[dict[str, ArrayInfo], ...]:
    """Shapes and dtypes of what `copy_out` gives."""

    def array(whole: ArrayInfo, length: int, window: int) -> ArrayInfo:
        _, heads, entries, *rest = whole.shape
        tokens = length // entries
        count = entries if window else -(-end // tokens) - start // tokens
        return ArrayInfo((heads, count, *rest), whole.dtype)

    return tuple(
        {name: array(whole, arrays["key"].shape[2], window) for name, whole in arrays.items() if name not in info.state}
        for arrays, window in zip(info.layers, info.windows, strict=True)
    )


def _parts(
    arrays: Mapping[str, NDArray[Any]], name: str, pages: Sequence[int], start: int, end: int
) -> Iterator[tuple[int, slice, slice]]:
    """Where the entries of a run of tokens lie, page by page: an index of page, heads and entries.

    An entry that is shared with tokens before or behind the run is in it.
    """
    length, entries = arrays["key"].shape[2], arrays[name].shape[2]
    tokens = length // entries
    first, last = start // tokens, -(-end // tokens)
    while first < last:
        page, low = divmod(first, entries)
        high = min(entries, low + last - first)
        yield pages[page], slice(None), slice(low, high)
        first += high - low
