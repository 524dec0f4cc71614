"""What rounding the weights costs: the same text through the model before and after, with exact attention.

`weight_loss` is for models that predict the next token; it is all that knows so.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ..attention import Dense
from .entries import SCORE_BLOCK, score_positions
from .manifest import CalibrationInfo, WeightLoss

MAX_TOKENS = 2048


def weight_loss(
    model: nnx.Module, rounded: nnx.Module, ids: Int[np.ndarray, " tokens"], text: CalibrationInfo
) -> WeightLoss:
    """Compares two models over the first `MAX_TOKENS` of the ids, which `text` describes."""
    ids = ids[:MAX_TOKENS]
    (before, most_likely), (after, then) = _scores(model, ids), _scores(rounded, ids)
    return WeightLoss(
        text=text.kind,
        tokens=ids.size,
        nll=_mean_nll(before),
        rounded_nll=_mean_nll(after),
        greedy_agreement=float(np.mean(most_likely == then)),
    )


def _mean_nll(logprobs: Float[np.ndarray, " tokens"]) -> float:
    """0 for a text of one token, which predicts nothing."""
    return -float(np.mean(logprobs, dtype=np.float64)) if logprobs.size else 0.0


def _scores(
    model: Any, ids: Int[np.ndarray, " tokens"]
) -> tuple[Float[np.ndarray, " predicted"], Int[np.ndarray, " tokens"]]:
    """Each next token's log-probability and the most likely one, without ever holding [tokens, vocab]."""
    graph, state = nnx.split(model)
    block = min(SCORE_BLOCK, ids.size)
    padding = (0, -ids.size % block)

    @jax.jit
    def run(state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = nnx.merge(graph, state)
        lengths = jnp.array([ids.size], jnp.int32)
        hidden, _ = model.hidden_states(
            tokens[None], offset=jnp.zeros_like(lengths), lengths=lengths, cache=None, attention=Dense()
        )
        return score_positions(model, hidden[0], targets, block)

    targets = np.append(ids[1:], 0).astype(np.int32)
    logprobs, argmax = run(state, np.pad(ids, padding), np.pad(targets, padding))
    return np.asarray(logprobs)[: ids.size - 1], np.asarray(argmax)[: ids.size]
