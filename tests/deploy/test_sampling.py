"""Sampling on the host."""

import numpy as np
import pytest

from iceformer.deploy.sampling import sample


def test_greedy_takes_the_first_of_a_tie() -> None:
    logits = np.array([0.0, 2.0, 2.0, -1.0], np.float32)
    assert sample(logits, 0.0, np.random.default_rng(0)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """20000 draws: each frequency lies within five standard deviations of its probability."""
    logits = np.array([1.0, 0.0, -1.0, 2.5, -30.0], np.float32)
    probabilities = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    generator = np.random.default_rng(0)
    draws = np.bincount([sample(logits, temperature, generator) for _ in range(20000)], minlength=5) / 20000
    deviation = np.sqrt(probabilities * (1 - probabilities) / 20000)
    assert (np.abs(draws - probabilities) <= 5 * deviation + 1e-9).all()
