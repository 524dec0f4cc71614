"""What rounding weights, or keys and values, costs: a row through the model before and after, with exact attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ..attention import Plan, Rows
from ..model.encoder import Encoder
from .calibration import CalibrationInputs
from .entries import SCORE_BLOCK, DecoderEntries, Weights, score_positions
from .manifest import ArrayInfo, QuantizationError

MAX_TOKENS = 2048
_LEAST_TOKENS, _PRODUCTS = 256, 4e12
"""Of a large model fewer tokens are read, by so many products of weights with activations, but never fewer than these,
which are enough of random ids."""

_Scores = tuple[Float[np.ndarray, " predicted"], Int[np.ndarray, " tokens"]]


def quantization_error(
    model: nnx.Module, rounded: nnx.Module, row: CalibrationInputs, first: int = 0
) -> QuantizationError:
    """Compares two models over a row, decoders by the tokens that they predict: at its first positions, `MAX_TOKENS` at
    most, or from position `first` on if that is not 0."""
    if isinstance(model, Encoder):
        before, after = (_hidden(each, row)[first:] for each in (model, rounded))
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        return QuantizationError(
            row.info.kind, row.tokens - first, cosine=float(np.mean((before * after).sum(-1) / lengths))
        )
    ids = row.inputs[0] if first else _leading(model, row)
    (before, most_likely), (after, then) = (_scores(each, ids) for each in (model, rounded))
    return _compared(row, (before[first:], most_likely[first:]), (after[first:], then[first:]))


def kv_quantization_error(model: nnx.Module, row: CalibrationInputs) -> QuantizationError:
    """Compares a decoder with itself over a KV cache of int8, over the row's first tokens, `MAX_TOKENS` at
    most."""
    ids = _leading(model, row)
    return _compared(row, _scores(model, ids), _scores(model, ids, "int8"))


def _leading(model: nnx.Module, row: CalibrationInputs) -> Int[np.ndarray, " tokens"]:
    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(model)))
    most = int(_PRODUCTS / parameters) if row.is_text else _LEAST_TOKENS
    return row.inputs[0, : min(max(most, _LEAST_TOKENS), MAX_TOKENS)]


def _compared(row: CalibrationInputs, *scores: _Scores) -> QuantizationError:
    (before, most_likely), (after, then) = scores
    return QuantizationError(
        text=row.info.kind,
        tokens=most_likely.size,
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


def _scores(model: Any, ids: Int[np.ndarray, " tokens"], kv_dtype: str = "") -> _Scores:
    """Each next token's log-probability and the most likely one, without ever holding [tokens, vocab]; over a cache of
    that dtype, or none."""
    block = min(SCORE_BLOCK, ids.size)
    padding = (0, -ids.size % block)
    entries = DecoderEntries.of(model, None)
    layers = entries.cache(ids.size + padding[1], 1, kv_dtype, 0).layers if kv_dtype else None

    @jax.jit
    def run(weights: Weights, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = entries.model(weights)
        cache = None if layers is None else tuple(map(_zeros, layers))
        rows = Rows.whole(jnp.array([ids.size], jnp.int32))
        hidden, _ = model.hidden_states(tokens[None], rows, plan=Plan(), cache=cache)
        return score_positions(model, hidden[0], targets, block)

    targets = np.append(ids[1:], 0).astype(np.int32)
    logprobs, argmax = run(entries.weights, np.pad(ids, padding), np.pad(targets, padding))
    return np.asarray(logprobs)[: ids.size - 1], np.asarray(argmax)[: ids.size]


def _zeros(layer: dict[str, ArrayInfo]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(array.shape, array.dtype) for name, array in layer.items()}
