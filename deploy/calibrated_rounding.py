"""Rounding a model's weights; int4 for the inputs that each layer gets of a text, one layer after the other.

Held are the moments of one layer's inputs at a time. Each layer sees what those before it make after rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32
from numpy.typing import ArrayLike

from ..attention import Plan, Rows
from ..model.int4 import inverse_factor, quantize_for_inputs, shrunk
from ..model.modules import Linear, observing_inputs
from ..model.registry import Model
from ..model.rope import RotaryTables
from ..model.rounding import form_of, round_linear, round_weights, set_int4
from ..model.self_attention import LayerCall
from .calibration import (
    MAX_TOKENS,
    ROUNDING_TOKENS,
    CalibrationInputs,
    calibrating_tokens,
    calibration_ids,
    calibration_inputs,
    inputs_of,
)

NEAREST, GPTQ = "nearest", "gptq"
"""Methods of rounding: each weight to its nearest, or `model.int4.quantize_for_inputs`."""
_ROW = 2048
"""Tokens of a row, at most."""
_HELD_OUT, _MOST_HELD_OUT = 4, 1024
"""One token of so many is not looked at, but at most so many, so that the loss can be measured on them."""


@dataclass(frozen=True)
class RoundingText:
    """What weights are rounded with.

    Attributes:
        inputs: rows of a text, for which they are rounded, as the model's `first_layer` takes them; None for `NEAREST`.
        fitted_tokens: tokens of the text that these rows are made of.
        judged: the row on which the loss is measured.
        first: its first position that counts, behind what the weights are rounded for.
    """

    inputs: Any
    fitted_tokens: int
    judged: CalibrationInputs
    first: int

    @property
    def method(self) -> str:
        """How weights are rounded."""
        return NEAREST if self.inputs is None else GPTQ


def rounding_text(model: Model, form: str, source: str | Path | ArrayLike | None, tokenizer_json: Path) -> RoundingText:
    """What a model's weights are rounded with: to int4, for a text, if there is one.

    Args and raises are those of `calibration_inputs`, and `form` is one of `model.rounding.FORMATS`.
    """
    config: Any = model.config
    row, longest = calibration_inputs(model, source, tokenizer_json), config.max_tokens or MAX_TOKENS
    if form != "int4" or not row.is_text:
        return RoundingText(None, 0, row, 0)
    ids, info = calibration_ids(source, tokenizer_json, config.vocab_size, ROUNDING_TOKENS, ROUNDING_TOKENS)
    fitted = ids.size - min(ids.size // _HELD_OUT, _MOST_HELD_OUT)
    rows = -(-fitted // min(_ROW, longest))
    inputs = inputs_of(model, ids[: fitted - fitted % rows].reshape(rows, -1))
    last = min(ids.size, calibrating_tokens(longest))
    judged = CalibrationInputs(inputs_of(model, ids[None, ids.size - last :]), last, info)
    return RoundingText(inputs, fitted, judged, max(last - (ids.size - fitted), 0) if fitted < ids.size else 0)


def round_model(
    model: Model, form: str, text: RoundingText, report: Callable[[str], None], activations: str = "same"
) -> Any:
    """The model with rounded weights, which shares everything else with the given model.

    Args:
        model: the model, which stays as it is.
        form: one of `model.rounding.FORMATS`.
        text: from `rounding_text`.
        report: is told what is done: of each layer with `GPTQ`, else once.
        activations: as `round_weights` takes them; "same" with int4.
    """
    if text.method == GPTQ:
        return round_for_inputs(model, text.inputs, report)
    report("rounding the weights")
    return round_weights(model, form, activations)


def round_for_inputs(model: Model, inputs: Any, report: Callable[[str], None]) -> Any:
    """The model with weights in int4, rounded for the inputs that they get.

    Args:
        model: the model, which stays as it is.
        inputs: rows of tokens without padding, as the model's `first_layer` takes them.
        report: is told of each layer.
    """
    rounded: Any = nnx.merge(*nnx.split(model))
    inputs = jax.tree.map(jnp.asarray, inputs)
    rows, tokens = jax.tree.leaves(inputs)[0].shape[:2]
    hidden, calls = rounded.first_layer(inputs, jnp.full((rows,), tokens, jnp.int32))
    for number, (layer, call) in enumerate(zip(rounded.layers, calls, strict=True), 1):
        report(f"rounding the weights of layer {number} of {len(calls)}")
        hidden = _round_layer(layer, hidden, call)
    return round_weights(rounded, "int4")


def _round_layer(
    layer: nnx.Module, hidden: Float[Array, "rows tokens hidden_size"], call: LayerCall
) -> Float[Array, "rows tokens hidden_size"]:
    """Rounds a layer for what it takes, and gives what it then makes of that."""
    linears = _linears(layer)
    graph, state = nnx.split(layer)
    _, moments = _run(graph, state, hidden, call.rows, call.rotary, observed=True)
    for names, moment in moments.items():
        in_int4 = [linears[name] for name in names if form_of(("layers", *name.split(".")), "int4") == "int4"]
        _round_together(in_int4, shrunk(np.asarray(moment), hidden.shape[0] * hidden.shape[1]))
    for name, linear in linears.items():
        if linear.scale is None:
            round_linear(linear, form_of(("layers", *name.split(".")), "int4"))
    graph, state = nnx.split(layer)
    hidden, _ = _run(graph, state, hidden, call.rows, call.rotary, observed=False)
    return hidden


def _round_together(linears: list[Linear], moments: Float32[np.ndarray, "in_features in_features"]) -> None:
    """Rounds layers that take the same input."""
    if not linears:
        return
    kernels = [np.asarray(linear.kernel[...], np.float32) for linear in linears]
    numbers, scales = quantize_for_inputs(np.concatenate(kernels, axis=1), inverse_factor(moments))
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])[:-1]
    for linear, *rounded in zip(linears, np.split(numbers, ends, 1), np.split(scales, ends, 1), strict=True):
        set_int4(linear, (rounded[0], rounded[1]))


@partial(jax.jit, static_argnames=("graph", "observed"))
def _run(
    graph: Any,
    state: Any,
    hidden: Float[Array, "rows tokens hidden_size"],
    rows: Rows,
    rotary: RotaryTables | None,
    *,
    observed: bool,
) -> tuple[Float[Array, "rows tokens hidden_size"], dict[tuple[str, ...], Float32[Array, "in_features in_features"]]]:
    """What a layer makes of its input; if `observed`, the sums of x x^T over the inputs x that its linear layers take,
    by the names of those that take them together."""
    layer = nnx.merge(graph, state)
    names = {id(linear): name for name, linear in _linears(layer).items()}
    moments: dict[tuple[str, ...], Array] = {}

    def observe(linears: tuple[Linear, ...], x: Array) -> None:
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        moments[tuple(names[id(linear)] for linear in linears)] = flat.T @ flat

    with observing_inputs(observe):
        hidden, _ = layer(hidden, LayerCall(rows, Plan(), rotary=rotary))
    return hidden, moments if observed else {}


def _linears(layer: nnx.Module) -> dict[str, Linear]:
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(layer) if isinstance(node, Linear)}
