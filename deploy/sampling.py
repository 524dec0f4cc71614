"""Choosing the next token from logits, on the host and in numpy, so that nothing is compiled for it."""

import math

import numpy as np
from numpy.typing import NDArray


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless `temperature` is a finite number that is not negative."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or a positive number")


def sample(logits: NDArray[np.float32], temperature: float, generator: np.random.Generator) -> int:
    """One token id from logits [vocab].

    At temperature 0 the most likely one, the lowest id of a tie; otherwise a draw from softmax(logits / temperature),
    by the Gumbel-max rule, which needs no normalisation and no cumulative sum.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    noise = generator.gumbel(size=logits.shape)
    return int(np.argmax(logits.astype(np.float64) / temperature + noise))
