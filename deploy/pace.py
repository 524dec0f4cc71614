"""`Pace`: by which calls the prompts of a bucket are read, so that none of them takes longer than a bound, by time."""

from collections import deque

from .manifest import BucketInfo

_KEPT = 8
"""Calls of each size whose seconds count. The longest of them decides."""


class Pace:
    """The calls that read the prompts of one bucket: whole chunks where these are within the bound, or small pieces.

    Until a call was timed, prompts are read in pieces. A chunk that was not timed counts as so many pieces. Where a
    piece is no whole number of query blocks, which would split what shares a selection, prompts are read in pieces
    always, so that time never decides on bits.

    Args:
        bucket: the bucket.
        bound: seconds that the calls of a step may take; None for one call a step, of any length.
    """

    def __init__(self, bucket: BucketInfo, bound: float | None) -> None:
        self.bound = bound
        self._bucket = bucket
        self._alike = bucket.tail % int(bucket.plan["prompt"].get("query_block", 1)) == 0
        self._seconds = {size: deque[float](maxlen=_KEPT) for size in (bucket.chunk, bucket.tail)}

    @property
    def whole(self) -> bool:
        """Whether a whole chunk is within the bound, or all there is."""
        if self.bound is None or self._bucket.tail == self._bucket.chunk:
            return True
        expected = self.expected(self._bucket.chunk)
        return self._alike and expected is not None and expected <= self.bound

    def expected(self, size: int) -> float | None:
        """Seconds of a call of that size, the longest of the last ones; None where nothing was timed."""
        tail = self._bucket.tail
        if self._seconds[size]:
            return max(self._seconds[size])
        return max(self._seconds[tail]) * size / tail if self._seconds[tail] else None

    def note(self, size: int, seconds: float) -> None:
        """Tells what a call took."""
        self._seconds[size].append(seconds)

    def fits(self, size: int, spent: float) -> bool:
        """Whether one more call may follow in a step whose calls took `spent` seconds."""
        expected = self.expected(size)
        return self.bound is not None and expected is not None and spent + expected <= self.bound
