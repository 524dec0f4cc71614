"""Rounding a model's weights; int4 for the inputs that each layer gets of a text, one layer after the other.

Held are the moments of one layer's inputs at a time. Each layer sees what those before it make after rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ..attention import Plan, Rows
from ..model.int4 import inverse_factor, quantize_for_inputs
from ..model.modules import Linear, observing_inputs
from ..model.registry import Model
from ..model.rope import RotaryTables
from ..model.rounding import form_of, round_linear, round_weights, set_int4
from ..model.self_attention import LayerCall
from .calibration import CalibrationInputs

NEAREST, GPTQ = "nearest", "gptq"
"""Methods of rounding: each weight to its nearest, or `model.int4.quantize_for_inputs`."""
_HELD_OUT = 4
"""One token of so many is not looked at, so that the error can be measured on it."""


@dataclass(frozen=True)
class Rounded:
    """A model with rounded weights.

    Attributes:
        model: it.
        method: `NEAREST` or `GPTQ`.
        fitted_tokens: first tokens of the text that the weights were rounded for; 0 with `NEAREST`.
    """

    model: Any
    method: str
    fitted_tokens: int


def rounding_method(form: str, row: CalibrationInputs) -> str:
    """How weights are rounded: to int4 with the inputs of a text, where there is one."""
    return GPTQ if form == "int4" and row.is_text else NEAREST


def round_model(model: Model, form: str, row: CalibrationInputs, report: Callable[[str], None]) -> Rounded:
    """The model with rounded weights, which shares everything else with the given model.

    Args:
        model: the model, which stays as it is.
        form: one of `model.rounding.FORMATS`.
        row: the text.
        report: is told what is done: of each layer with `GPTQ`, else once.
    """
    if rounding_method(form, row) == NEAREST:
        report("rounding the weights")
        return Rounded(round_weights(model, form), NEAREST, 0)
    tokens = row.tokens - row.tokens // _HELD_OUT
    inputs = jax.tree.map(lambda array: array[:, :tokens], row.inputs)
    return Rounded(round_for_inputs(model, inputs, report), GPTQ, tokens)


def round_for_inputs(model: Model, inputs: Any, report: Callable[[str], None]) -> Any:
    """The model with weights in int4, rounded for the inputs that they get.

    Args:
        model: the model, which stays as it is.
        inputs: rows of tokens without padding, as the model's `first_layer` takes them.
        report: is told of each layer.
    """
    rounded: Any = nnx.merge(*nnx.split(model))
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
        _round_together(in_int4, np.asarray(moment))
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
