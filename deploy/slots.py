"""The places in a bucket's KV cache: slots, and the pages of each where the cache has pages."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .manifest import BucketInfo


class Slots:
    """Who has which slot of a bucket, and which pages.

    Attributes:
        table: int32 [slots, pages of a slot], the page of each run of a slot's tokens; None where a slot is one page.
            What stands for tokens that a slot has no page for is page 0, which nothing reads or writes for it.
    """

    def __init__(self, bucket: BucketInfo, slots: int) -> None:
        self._bucket, self._page = bucket, bucket.cache.page
        self._free = list(range(slots))
        per_slot = bucket.capacity // self._page if self._page else 0
        self._free_pages = list(range(slots * per_slot))
        self._pages: dict[int, list[int]] = {}
        self.table: NDArray[np.int32] | None = np.zeros((slots, per_slot), np.int32) if self._page else None

    @property
    def free(self) -> bool:
        """Whether there is a slot."""
        return bool(self._free)

    def take(self, tokens: int) -> int:
        """A slot with room for so many tokens, or for as many as the bucket has; there must be one.

        Prompts are written in whole chunks: there is room for all of the last one.
        """
        slot = self._free.pop(0)
        if self.table is not None:
            chunk, capacity = self._bucket.chunk, self._bucket.capacity
            count = -(-min(-(-tokens // chunk) * chunk, capacity) // self._page)
            pages, self._free_pages = self._free_pages[:count], self._free_pages[count:]
            self.table[slot] = 0
            self.table[slot, :count] = pages
            self._pages[slot] = pages
        return slot

    def pages(self, slot: int) -> Sequence[int]:
        """The pages of a slot in the order of its tokens; where a slot is one page, that."""
        return [slot] if self.table is None else self._pages[slot]

    def give_back(self, slot: int) -> None:
        """The slot and its pages are free again."""
        self._free.append(slot)
        self._free_pages += self._pages.pop(slot, [])
