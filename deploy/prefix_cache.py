"""`PrefixCache`: what prefill left in the KV cache for the pieces of earlier prompts, so that a prompt that begins with
the same pieces starts behind them.

A piece is kept under its tokens, those before it, the calls that read them, and the layout of its arrays, so that a
restored piece has the very bits that computing it again would give. What a piece's bits may depend on besides is how
near the prompt's end is (`TwoStage.exact_last_block`): pieces that near are neither kept nor used.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..kernels import IN_A_KERNEL
from .cache_copy import Layers
from .manifest import TAIL_ENTRY, BucketInfo

Key = bytes
"""SHA-256 of a layout, and of the pieces and tokens up to the end of a piece."""


@dataclass(frozen=True, eq=False)
class KeptPiece:
    """A piece of a prompt that one call read: a chunk, or a part of the prompt's end.

    Attributes:
        key: of the piece.
        tokens: how many it has.
        layers: what `cache_copy.copy_out` gave.
        mapped: whether they are a file's, mapped into memory, and take none of the limit.
    """

    key: Key
    tokens: int
    layers: Layers
    mapped: bool = False

    @cached_property
    def size_in_bytes(self) -> int:
        """Memory that it takes of the limit."""
        return 0 if self.mapped else sum(array.nbytes for layer in self.layers for array in layer.values())


def piece_keys(bucket: BucketInfo, ids: NDArray[np.int32], sizes: Sequence[int]) -> list[Key]:
    """Keys of the pieces of a prompt that may be kept or restored, in their order.

    The last token is always computed, because its logits are wanted. Buckets that read alike and keep the same arrays
    share keys, where native kernels read: what a smaller one has read, a larger one goes on from. XLA's sums may differ
    with a bucket's capacity.

    Args:
        bucket: where it is read.
        ids: int32 [n], the prompt.
        sizes: tokens of the calls that read it.
    """
    hashed = hashlib.sha256(_layout(bucket).encode())
    keys: list[Key] = []
    end, last = 0, len(ids) - tokens_behind(bucket)
    for size in sizes:
        start, end = end, end + size
        if end > last:
            break
        hashed.update(f" {size} ".encode() + np.ascontiguousarray(ids[start:end], np.int32).tobytes())
        keys.append(hashed.copy().digest())
    return keys


def reading_calls(bucket: BucketInfo, tokens: int) -> tuple[list[int], list[int]]:
    """Two ways to read a prompt, by the tokens of each call: in whole chunks as far as they go, and in small pieces."""
    return bucket.piece_sizes(tokens), [bucket.tail] * -(-tokens // bucket.tail)


def _layout(bucket: BucketInfo) -> str:
    """What the arrays of a piece depend on besides its tokens and the calls."""
    cache = bucket.cache
    layers = [
        {
            name: (array.dtype, layer["key"].shape[2] // array.shape[2], array.shape[3:])
            for name, array in layer.items()
            if name not in cache.state
        }
        for layer in cache.layers
    ]
    computed = (
        kind for name in ("prefill", TAIL_ENTRY) if name in bucket.entries for kind in bucket.entries[name].attention
    )
    capacity = "" if all(kind.endswith(IN_A_KERNEL) for kind in computed) else bucket.capacity
    return f"{bucket.plan['prompt']} {cache.windows} {capacity} {layers}"


def tokens_behind(bucket: BucketInfo) -> int:
    """Tokens of a prompt that must follow a piece for its bits not to depend on where the prompt ends."""
    plan = bucket.plan["prompt"]
    return max(1, int(plan["query_block"])) if plan.get("exact_last_block") else 1


class PrefixCache:
    """Pieces of earlier prompts, within a limit; those that were used longest ago leave first.

    Args:
        limit: bytes of memory; 0 keeps only what files hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pieces: OrderedDict[Key, KeptPiece] = OrderedDict()

    @property
    def size_in_bytes(self) -> int:
        """Memory that its pieces take of the limit."""
        return sum(piece.size_in_bytes for piece in self._pieces.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._pieces

    def find(self, keys: Sequence[Key]) -> list[KeptPiece]:
        """The pieces that are here of a prompt's, up to the first that is not."""
        found = list(itertools.takewhile(self._pieces.__contains__, keys))
        self._use(found)
        return [self._pieces[key] for key in found]

    def count(self, keys: Sequence[Key]) -> int:
        """How many pieces `find` would give; it does not count as use."""
        return sum(1 for _ in itertools.takewhile(self._pieces.__contains__, keys))

    def has_room(self, size: int, before: Sequence[Key]) -> bool:
        """Whether a piece of so many bytes fits, if all but those before it in its prompt leave."""
        held = sum(self._pieces[key].size_in_bytes for key in before if key in self._pieces)
        return held + size <= self.limit

    def keep(self, piece: KeptPiece, before: Sequence[Key] = ()) -> None:
        """Takes a piece, for which there is room, and lets others go, but none of those before it in its prompt."""
        self._pieces[piece.key] = piece
        self._use((*before, piece.key))
        excess = self.size_in_bytes - self.limit
        for key, oldest in list(self._pieces.items()):
            if excess <= 0:
                break
            if not oldest.mapped:
                del self._pieces[key]
                excess -= oldest.size_in_bytes

    def clear(self) -> None:
        """Lets go of everything."""
        self._pieces.clear()

    def _use(self, keys: Sequence[Key]) -> None:
        """Marks pieces of one prompt as used, the first last: without it the others are worth nothing."""
        for key in reversed(keys):
            if key in self._pieces:
                self._pieces.move_to_end(key)
