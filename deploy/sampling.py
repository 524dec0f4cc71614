"""Choosing the next token from logits, on the host and in numpy, so that nothing is compiled for it.

`Sampling` has the options of one request, `Sampler` what they need while it runs. Options and their order are those of
transformers' logits processors; presence and frequency penalties are those of OpenAI's API.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import check_count

MOST_LOGPROBS = 20
"""How many tokens `top_logprobs` gives at most."""

_FLOAT32 = np.finfo(np.float32)
_LARGEST = float(_FLOAT32.max)
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, sys.float_info.max, "0 (greedy) or a positive number"),
    "top_p": (math.ulp(0.0), 1.0, "a number above 0 and at most 1 (off)"),
    "min_p": (0.0, 1.0, "a number from 0 (off) to 1"),
    "repetition_penalty": (float(_FLOAT32.tiny), _LARGEST, "a positive number, 1 for none"),
    "presence_penalty": (-2.0, 2.0, "a number from -2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "a number from -2 to 2"),
}
"""Smallest and largest value of each option that is a number, and both in words."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen; the default takes the most likely one each time.

    Attributes:
        temperature: 0 takes the most likely token, the lowest id of a tie; above 0 draws from
            softmax(logits / temperature).
        top_k: draws from the k most likely tokens, and from all that tie with the last of them; 0 for all tokens.
        top_p: draws from the fewest most likely tokens that have this probability together; 1 for all.
        min_p: draws from the tokens that have at least this share of the largest probability; 0 for all.
        repetition_penalty: divides the positive logits of tokens that the prompt or the text has, and multiplies their
            negative ones; 1 for none.
        presence_penalty: taken from the logit of each token that was written, from -2 to 2.
        frequency_penalty: taken from the logit of a token each time that it was written, from -2 to 2.
        logit_bias: added to the logits of these token ids, before everything else.
        seed: of the draws.

    Raises:
        ValueError: a value that makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: _number(getattr(self, name), name, *_RANGES[name]) for name in _RANGES}
        checked |= {name: check_count(getattr(self, name), name, 0) for name in ("top_k", "seed")}
        checked["logit_bias"] = _biases(self.logit_bias)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: at temperature 0, and at one too small to divide by."""
        return self.temperature < sys.float_info.min

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if `logit_bias` has a token id that a vocabulary of this size does not have."""
        highest = max(self.logit_bias, default=-1)
        if highest >= vocab_size:
            raise ValueError(f"logit_bias has token id {highest}, expected ids below {vocab_size}")


class Sampler:
    """Chooses the tokens of one request. It keeps its generator, and which tokens came before.

    Args:
        sampling: the options, checked against the vocabulary.
        prompt_ids: int [n], in the vocabulary.
        vocab_size: number of logits.
    """

    def __init__(self, sampling: Sampling, prompt_ids: NDArray[np.integer[Any]], vocab_size: int) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)
        self._biased = np.array(list(sampling.logit_bias), np.intp)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.float32] | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt_ids] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits [vocab]. `accept` tells that it was written.

        Each call draws once, by the Gumbel-max rule, which needs no normalisation and no cumulative sum.

        Raises:
            RuntimeError: a logit is not a number, or the largest one is infinite.
        """
        if self._sampling.greedy:
            scores = self._adjusted(logits)
            best = int(np.argmax(scores))  # of a NaN, if there is one
            _check_largest(scores[best])
            return best
        ids, scores = self.candidates(logits)
        scores += self._generator.gumbel(size=len(scores))
        return int(ids[np.argmax(scores)])

    def accept(self, token: int) -> None:
        """Tells that a token was written."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def candidates(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """What `choose` draws from at a temperature above 0: ids [n], lowest first, and their logits, largest 0."""
        options, scores = self._sampling, self._adjusted(logits)
        largest = scores.max()
        _check_largest(largest)
        ids = np.arange(len(scores))
        if options.top_k:
            ids = _most_likely(scores, options.top_k)
            scores = scores[ids]
        # Below the largest one, so that what is too large for a number is -inf, which is never drawn.
        with np.errstate(over="ignore"):
            below = np.subtract(scores, largest, dtype=np.float64)
            below /= options.temperature
        if options.top_p < 1:
            stay = _nucleus(below, options.top_p)
            ids, below = ids[stay], below[stay]
        if options.min_p > 0:
            stay = np.exp(below) >= options.min_p
            ids, below = ids[stay], below[stay]
        return ids, below

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits after bias and penalties; the given array itself if there are none."""
        if not len(self._biased) and self._seen is None and self._counts is None:
            return logits
        options, scores = self._sampling, logits.copy()
        scores[self._biased] += self._bias
        if self._seen is not None:
            where = self._seen & np.isfinite(scores)  # -inf stays what it is
            seen = scores[where]
            with np.errstate(over="ignore"):
                seen = np.where(seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty)
            scores[where] = np.clip(seen, -_LARGEST, _LARGEST)
        if self._counts is not None:
            written = np.flatnonzero(self._counts > 0)
            scores[written] -= options.presence_penalty + options.frequency_penalty * self._counts[written]
        return scores


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, and what else might have come.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: (token id, natural logarithm of its probability) of the most likely tokens, the most likely first, and the
            lowest id first among equals.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def top_logprobs(logits: NDArray[np.float32], chosen: int, n: int) -> TokenLogprobs:
    """Log-probabilities in softmax(logits), which is the model's own distribution, before any option.

    Args:
        logits: float32 [vocab], as the model gives them.
        chosen: the token that was written.
        n: how many of the most likely tokens to name, from 0 to `MOST_LOGPROBS`.

    Raises:
        ValueError: another n.
        RuntimeError: a logit is not a number, or the largest one is infinite.
    """
    if not 0 <= n <= MOST_LOGPROBS:
        raise ValueError(f"n is {n}, expected 0 to {MOST_LOGPROBS}")
    largest = logits.max()
    _check_largest(largest)
    total = float(largest) + math.log(np.exp(logits - np.float64(largest)).sum())
    ids = _most_likely(logits, n) if n else np.arange(0)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:n]
    return TokenLogprobs(float(logits[chosen]) - total, tuple((int(id), float(logits[id]) - total) for id in ids))


def _number(value: Any, name: str, least: float, most: float, expected: str) -> float:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
        raise ValueError(f"{name} is {number!r}, expected {expected}")
    return float(number)


def _biases(given: Any) -> Mapping[int, float]:
    """A copy of a bias that nobody can change."""
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias is a {type(given).__name__}, expected a mapping of token ids to numbers")
    ids = [check_count(id, "a token id of logit_bias", 0) for id in given]
    values = [
        _number(value, f"logit_bias of token {id}", -_LARGEST, _LARGEST, "a finite number")
        for id, value in given.items()
    ]
    return MappingProxyType(dict(zip(ids, values, strict=True)))


def _check_largest(largest: np.float32) -> None:
    if not np.isfinite(largest):
        raise RuntimeError(
            f"the largest logit is {largest}, expected a finite number: the model cannot compute this text in its "
            "number formats"
        )


def _most_likely(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest scores, and of all that equal the last of them."""
    if count >= len(scores):
        return np.arange(len(scores))
    place = len(scores) - count
    return np.flatnonzero(scores >= np.partition(scores, place)[place])


def _nucleus(below: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Which tokens top-p keeps, by their logits.

    From the least likely on, tokens go as long as all that went have at most 1 - top_p together; of equals the higher
    id goes first. The most likely one stays.
    """
    weights = np.exp(below)
    allowed = (1 - top_p) * weights.sum()
    # All that have less than an equal share of what may go do go, and need not be sorted.
    contested = weights >= allowed / len(weights)
    gone = weights.sum(where=~contested)
    rising = np.sort(weights[contested])
    first = np.count_nonzero(gone + np.cumsum(rising[:-1]) <= allowed)
    stay = weights > rising[first]
    equal = np.flatnonzero(weights == rising[first])
    stay[equal[: len(rising) - first - np.count_nonzero(stay)]] = True
    return stay
