"""What rounding the weights costs: the same row through the model before and after, with exact attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ..attention import Plan, Rows
from ..model.encoder import Encoder
from .calibration import CalibrationInputs
from .entries import SCORE_BLOCK, score_positions
from .manifest import QuantizationError

MAX_TOKENS = 2048


def quantization_error(model: nnx.Module, rounded: nnx.Module, row: CalibrationInputs) -> QuantizationError:
    """Compares two models over a row; decoders over its first `MAX_TOKENS`, by the tokens that they predict."""
    if isinstance(model, Encoder):
        before, after = (_hidden(each, row) for each in (model, rounded))
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        return QuantizationError(row.info.kind, row.tokens, cosine=float(np.mean((before * after).sum(-1) / lengths)))
    ids = row.inputs[0, :MAX_TOKENS]
    (before, most_likely), (after, then) = _scores(model, ids), _scores(rounded, ids)
    return QuantizationError(
        text=row.info.kind,
        tokens=ids.size,
        nll=_mean_nll(before),
        rounded_nll=_mean_nll(after),
        greedy_agreement=float(np.mean(most_likely == then)),
    )


def _hidden(model: Any, row: CalibrationInputs) -> Float[np.ndarray, "tokens hidden_size"]:
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: Any, inputs: Any) -> jax.Array:
        lengths = jnp.array([row.tokens], jnp.int32)
        return nnx.merge(graph, state).encode(inputs, lengths)["last_hidden_state"][0]

    return np.asarray(run(state, row.inputs), np.float64)


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
        hidden, _ = model.hidden_states(tokens[None], Rows.whole(lengths), plan=Plan())
        return score_positions(model, hidden[0], targets, block)

    targets = np.append(ids[1:], 0).astype(np.int32)
    logprobs, argmax = run(state, np.pad(ids, padding), np.pad(targets, padding))
    return np.asarray(logprobs)[: ids.size - 1], np.asarray(argmax)[: ids.size]
