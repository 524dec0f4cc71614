"""Guessed tokens: a text that repeats what stands before it goes on as that did (prompt lookup decoding, Saxena 2023).

A `Guesser` follows one text and guesses its next tokens. `CallCosts` knows what calls take. `share_rows` decides from
both whether checking guesses pays, and which ones: what is not worth its time is not checked.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .manifest import BucketInfo

_SHORTEST, _LONG, _LONGEST = 2, 4, 16
"""Tokens that must have stood before for a guess; from which on such a match counts as long; that are compared."""
_FIRST_RATES = {False: 0.3, True: 0.6}
"""How often a guess is taken to be right before any was seen, behind short and behind long matches."""
_NEWS = 0.2
"""Weight of the last guess in that rate."""
_FIRST_RATIO = 1.5
"""What a check is taken to cost, in calls that check nothing, before one was measured."""
_KEPT = 7
"""Calls whose median is their cost."""
_FORGET = 128
"""Calls without a check after which its cost is no longer known: the machine may have been busy then."""


class Guesser:
    """Guesses how a text goes on: as it did after the longest of its ends that it had before, the last time.

    Every guess is compared with the token that comes, whether it was checked or not: that tells what guesses are worth.

    Args:
        prompt: int32 [n].
        more: tokens that will be written at most.
    """

    def __init__(self, prompt: NDArray[np.int32], more: int) -> None:
        self._count = len(prompt)
        self._ids = np.zeros(self._count + more, np.int32)
        self._ids[: self._count] = prompt
        self._rates = dict(_FIRST_RATES)
        self._long = False
        self._pending: list[int] = []

    def guess(self, most: int) -> list[int]:
        """The next tokens, up to `most`; none where the text has not been here before."""
        end, length = self._match()
        if length < _SHORTEST:
            self._pending = []
            return []
        self._long = length >= _LONG
        period = self._count - end  # after which a text that repeats itself begins again
        self._pending = [int(self._ids[end + i % period]) for i in range(most)]
        return list(self._pending)

    def accept(self, token: int) -> None:
        """Tells that a token was written."""
        if self._pending:
            guess, *rest = self._pending
            self._rates[self._long] += _NEWS * ((guess == token) - self._rates[self._long])
            self._pending = rest if guess == token else []
        self._ids[self._count] = token
        self._count += 1

    @property
    def rate(self) -> float:
        """The share of guesses like the last ones that were right."""
        return self._rates[self._long]

    def _match(self) -> tuple[int, int]:
        """Where the longest end of the text that stands in it before ends there, for the last time, and its length."""
        ids, count = self._ids, self._count
        ends = np.flatnonzero(ids[: count - 1] == ids[count - 1]) + 1
        length = min(len(ends), 1)
        while len(ends) and length < _LONGEST:
            longer = ends[ends > length]
            longer = longer[ids[longer - 1 - length] == ids[count - 1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        return (int(ends[-1]), length) if length else (count, 0)


@dataclass(eq=False)
class CallCosts:
    """Seconds of a bucket's last calls: those that check guesses, and plain ones."""

    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _checks: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _since: int = 0

    def note(self, seconds: float, *, checked: bool) -> None:
        """Tells what a call took."""
        (self._checks if checked else self._plain).append(seconds)
        self._since = 0 if checked else self._since + 1
        if self._since > _FORGET:
            self._checks.clear()

    @property
    def ratio(self) -> float:
        """What a check costs, in plain calls."""
        if not self._plain or not self._checks:
            return _FIRST_RATIO
        return statistics.median(self._checks) / statistics.median(self._plain)


def share_rows(guesses: Sequence[Sequence[int]], rates: Sequence[float], spare: int, ratio: float) -> list[int]:
    """How many guesses of each text to check in one call; 0 of all where that does not pay.

    Args:
        guesses: of each text that the call writes a token of.
        rates: the share of each text's guesses that are right. A guess counts only if those before it are right, too.
        spare: guesses that the call has room for.
        ratio: what the call costs more than one that checks nothing, as a factor.
    """
    taken, gain = [0] * len(guesses), 0.0
    worth = list(rates)
    for _ in range(spare):
        open_ = [text for text, own in enumerate(guesses) if taken[text] < len(own)]
        if not open_:
            break
        best = max(open_, key=lambda text: worth[text])
        taken[best] += 1
        gain += worth[best]
        worth[best] *= rates[best]
    return taken if gain > len(guesses) * (ratio - 1) else [0] * len(guesses)


def most_guesses(bucket: BucketInfo, position: int) -> int:
    """Guesses that may follow the token at a position, such that one that is wrong leaves nothing behind.

    A guess must not take the place in a ring of the tokens that are checked with it. Where new tokens keep a selection
    for some steps (`DecodeSelection.refresh`), it must not be the one that makes it anew: that token is written by
    itself.
    """
    most = min([bucket.capacity - 1 - position, *(window - 1 for window in bucket.cache.windows if window)])
    if not bucket.cache.state:
        return most
    plan = bucket.plan["decode"]
    refresh, exact_keys = int(plan["refresh"]), max(int(plan["budget"]), int(plan["crossover"]))
    until_renewed = refresh - 1 - position % refresh
    until_selecting = exact_keys - 1 - position if position < exact_keys else bucket.capacity
    return min(most, until_renewed, until_selecting)
