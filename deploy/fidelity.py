"""How near a configuration's predictions of a text are to those of exact attention, position by position."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from ..model.decoder import CausalLM
from .entries import SCORE_BLOCK

BINS = 32
"""Stretches of equal length that a window's positions are averaged over."""


@dataclass(frozen=True)
class Fidelity:
    """Means over some positions of a text, of the prediction of the next token.

    Attributes:
        positions: how many.
        exact_logprob: log-probability of the text's own token with exact attention, natural logarithm.
        logprob: the same with the configuration.
        agreement: share of positions at which both have the same most likely token.
        kl: Kullback-Leibler divergence KL(exact || configuration), in nats.
    """

    positions: int
    exact_logprob: float
    logprob: float
    agreement: float
    kl: float

    @property
    def loss(self) -> float:
        """By how much the mean log-probability falls."""
        return self.exact_logprob - self.logprob

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity with the configuration over that with exact attention."""
        return math.exp(self.loss)

    @classmethod
    def of(cls, predictions: "Predictions") -> "Fidelity":
        """Means over all positions of some predictions."""
        means = {name: float(np.mean(values)) for name, values in predictions.items()}
        return cls(predictions["kl"].size, **means)

    @classmethod
    def merged(cls, parts: Iterable["Fidelity"]) -> "Fidelity":
        """Means over the positions of all parts.

        Raises:
            ValueError: no positions at all.
        """
        parts = list(parts)
        positions = sum(part.positions for part in parts)
        if not positions:
            raise ValueError("there are no positions to average over")

        def mean(values: Iterable[float]) -> float:
            weighted = (value * part.positions for value, part in zip(values, parts, strict=True))
            return math.fsum(weighted) / positions

        return cls(
            positions,
            mean(part.exact_logprob for part in parts),
            mean(part.logprob for part in parts),
            mean(part.agreement for part in parts),
            mean(part.kl for part in parts),
        )


def first_of_last_quarter(tokens: int) -> int:
    """The position at which the last quarter of a window of that many tokens begins."""
    return tokens * 3 // 4


def last_quarter(bins: tuple[Fidelity, ...]) -> Fidelity:
    """Over the last quarter of a window's positions, from the averages of its stretches."""
    return Fidelity.merged(bins[-len(bins) // 4 :])


Predictions = dict[str, Float[np.ndarray, " predicted"]]
"""The attributes of `Fidelity`, by name, for each position that predicts a token of the text."""
Compare = Callable[[Array, Array, np.ndarray], Predictions]


def comparison(exact: CausalLM, other: CausalLM) -> Compare:
    """A function that compares hidden states [tokens, hidden] of two models, which may differ in their weights' format,
    over the text's token ids [tokens]. It holds the logits of `SCORE_BLOCK` positions at a time.
    """
    (exact_graph, exact_state), (other_graph, other_state) = nnx.split(exact), nnx.split(other)

    @jax.jit
    def run(exact_state: Any, other_state: Any, hidden: Array, other_hidden: Array, targets: Array) -> Any:
        models = nnx.merge(exact_graph, exact_state), nnx.merge(other_graph, other_state)

        def block(args: tuple[Array, Array, Array]) -> dict[str, Array]:
            *states, targets = args
            p, q = (jax.nn.log_softmax(model.logits(x)) for model, x in zip(models, states, strict=True))
            return _of_distributions(p, q, targets)

        return lax.map(block, (_blocks(hidden), _blocks(other_hidden), _blocks(targets)))

    def compare(hidden: Array, other_hidden: Array, ids: Int32[np.ndarray, " tokens"]) -> Predictions:
        padding = -ids.size % SCORE_BLOCK
        hidden, other_hidden = (jnp.pad(x, ((0, padding), (0, 0))) for x in (hidden, other_hidden))
        targets = np.pad(ids[1:], (0, padding + 1))
        found = run(exact_state, other_state, hidden, other_hidden, targets)
        return {name: np.asarray(x, np.float64).reshape(-1)[: ids.size - 1] for name, x in found.items()}

    return compare


def binned(predictions: Predictions, tokens: int) -> tuple[Fidelity, ...]:
    """Means over `BINS` stretches of a window of that many tokens, of which the last predicts nothing."""
    edges = np.arange(1, BINS) * tokens // BINS
    parts = {name: np.split(values, edges) for name, values in predictions.items()}
    return tuple(Fidelity.of({name: part[index] for name, part in parts.items()}) for index in range(BINS))


def _of_distributions(
    p: Float[Array, "positions vocab"], q: Float[Array, "positions vocab"], targets: Int32[Array, " positions"]
) -> dict[str, Float[Array, " positions"]]:
    """From log-probabilities."""

    def given(logprobs: Array) -> Array:
        return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]

    return {
        "exact_logprob": given(p),
        "logprob": given(q),
        "agreement": (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32),
        "kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1),
    }


def _blocks(x: Array) -> Array:
    return x.reshape(-1, SCORE_BLOCK, *x.shape[1:])
