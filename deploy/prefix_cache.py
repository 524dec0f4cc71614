"""`PrefixCache`: what prefill left in the KV cache for the chunks of earlier prompts, so that a prompt that begins with
the same chunks starts behind them.

Chunks of a prompt always begin at the same positions and run through the same machine code, so that a restored chunk
has the very bits that computing it again would give. What a chunk's bits may depend on besides its tokens and those
before it is how near the prompt's end is (`TwoStage.exact_last_block`): chunks that near are neither kept nor used.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cache_copy import Layers
from .manifest import BucketInfo

Key = bytes
"""SHA-256 of a bucket and of all tokens up to the end of a chunk."""


@dataclass(frozen=True, eq=False)
class KeptChunk:
    """A chunk of a prompt.

    Attributes:
        key: of the chunk.
        layers: what `cache_copy.copy_out` gave.
        mapped: whether they are a file's, mapped into memory, and take none of the limit.
    """

    key: Key
    layers: Layers
    mapped: bool = False

    @property
    def size_in_bytes(self) -> int:
        """Memory that it takes of the limit."""
        return 0 if self.mapped else sum(array.nbytes for layer in self.layers for array in layer.values())


def chunk_keys(bucket: BucketInfo, ids: NDArray[np.int32]) -> list[Key]:
    """Keys of the chunks of a prompt that may be kept or restored, in their order.

    The last token is always computed, because its logits are wanted.
    """
    chunk = bucket.chunk
    hashed = hashlib.sha256(f"{bucket.capacity} {chunk} ".encode())
    keys: list[Key] = []
    for end in range(chunk, len(ids) - tokens_behind(bucket) + 1, chunk):
        hashed.update(np.ascontiguousarray(ids[end - chunk : end], np.int32).tobytes())
        keys.append(hashed.copy().digest())
    return keys


def tokens_behind(bucket: BucketInfo) -> int:
    """Tokens of a prompt that must follow a chunk for its bits not to depend on where the prompt ends."""
    plan = bucket.plan["prompt"]
    return max(1, int(plan["query_block"])) if plan.get("exact_last_block") else 1


class PrefixCache:
    """Chunks of earlier prompts, within a limit; those that were used longest ago leave first.

    Args:
        limit: bytes of memory; 0 keeps only what files hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size_in_bytes = 0
        self._chunks: OrderedDict[Key, KeptChunk] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._chunks

    def find(self, keys: Sequence[Key]) -> list[KeptChunk]:
        """The chunks that are here of a prompt's, up to the first that is not."""
        found = list(itertools.takewhile(self._chunks.__contains__, keys))
        self._use(found)
        return [self._chunks[key] for key in found]

    def has_room(self, size: int, before: Sequence[Key]) -> bool:
        """Whether a chunk of so many bytes fits, if all but those before it in its prompt leave."""
        held = sum(self._chunks[key].size_in_bytes for key in before if key in self._chunks)
        return held + size <= self.limit

    def keep(self, chunk: KeptChunk, before: Sequence[Key] = ()) -> None:
        """Takes a chunk, for which there is room, and lets others go, but none of those before it in its prompt."""
        self._chunks[chunk.key] = chunk
        self.size_in_bytes += chunk.size_in_bytes
        self._use((*before, chunk.key))
        for key, oldest in list(self._chunks.items()):
            if self.size_in_bytes <= self.limit:
                break
            if not oldest.mapped:
                del self._chunks[key]
                self.size_in_bytes -= oldest.size_in_bytes

    def clear(self) -> None:
        """Lets go of everything."""
        self._chunks.clear()
        self.size_in_bytes = 0

    def _use(self, keys: Sequence[Key]) -> None:
        """Marks chunks of one prompt as used, the first last: without it the others are worth nothing."""
        for key in reversed(keys):
            if key in self._chunks:
                self._chunks.move_to_end(key)
