"""Choosing the next token from logits, on the host and in numpy, so that nothing is compiled for it."""

import sys
from numbers import Real

import numpy as np
from numpy.typing import NDArray


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless `temperature` is a finite number that is not negative."""
    is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not (is_number and 0 <= temperature <= sys.float_info.max):
        raise ValueError(f"temperature is {temperature!r}, expected 0 (greedy) or a positive number")


def sample(logits: NDArray[np.float32], temperature: float, generator: np.random.Generator) -> int:
    """One token id from logits [vocab].

    At temperature 0, and at one too small to divide by, the most likely one, the lowest id of a tie; otherwise a draw
    from softmax(logits / temperature), by the Gumbel-max rule, which needs no normalisation and no cumulative sum.
    """
    if temperature < np.finfo(np.float64).tiny:
        return int(np.argmax(logits))
    noise = generator.gumbel(size=logits.shape)
    # Below the largest one, so that what is too large for a number is -inf, which is never drawn.
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):
        return int(np.argmax(below / float(temperature) + noise))
