"""Rounding a model's weights; int4 for the inputs that each layer gets of a text, one layer after the other.

Held are the moments of one layer's inputs at a time, and of the experts of a mixture those of one expert. Each layer
sees what those before it make after rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32
from numpy.typing import ArrayLike

from ..attention import Plan, Rows
from ..model.int4 import inverse_factor, quantize_for_inputs, shrunk, shrunk_towards
from ..model.modules import Linear, observing_inputs
from ..model.moe import Expert, SparseMoE
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

_Moments = Float32[Array, "_ _"]
"""The sum of x x^T over inputs x."""


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


@dataclass(frozen=True)
class RoundedModel:
    """A model with rounded weights.

    Attributes:
        model: which shares everything that is not rounded with the model before.
        unseen_experts: experts of all its layers that got no token of the text that weights are rounded for.
    """

    model: Any
    unseen_experts: int = 0


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
) -> RoundedModel:
    """Rounds a model's weights.

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
    return RoundedModel(round_weights(model, form, activations))


def round_for_inputs(model: Model, inputs: Any, report: Callable[[str], None]) -> RoundedModel:
    """Rounds weights to int4, for the inputs that they get.

    Args:
        model: the model, which stays as it is.
        inputs: rows of tokens without padding, as the model's `first_layer` takes them.
        report: is told of each layer.
    """
    rounded: Any = nnx.merge(*nnx.split(model))
    inputs = jax.tree.map(jnp.asarray, inputs)
    rows, tokens = jax.tree.leaves(inputs)[0].shape[:2]
    hidden, calls = rounded.first_layer(inputs, jnp.full((rows,), tokens, jnp.int32))
    unseen = 0
    for number, (layer, call) in enumerate(zip(rounded.layers, calls, strict=True), 1):
        report(f"rounding the weights of layer {number} of {len(calls)}")
        hidden, its_unseen = _round_layer(layer, hidden, call)
        unseen += its_unseen
    return RoundedModel(round_weights(rounded, "int4"), unseen)


def round_experts_for_inputs(mixture: SparseMoE, x: Float[Array, "tokens hidden_size"]) -> int:
    """Rounds each expert to int4 for the tokens that it gets, and gives the number of those that get none.

    The fewer they are, the more the gate and up projection are rounded for all tokens. A down projection that gets
    nothing is rounded to the nearest.

    Args:
        mixture: whose experts are stacks.
        x: what it takes.
    """
    chosen, tokens, unseen = np.asarray(mixture.route(x)[1]), np.asarray(x), 0
    common = shrunk(np.asarray(_moments(x)), len(tokens)) / np.float32(len(tokens))

    def finish(number: int, expert: Expert) -> None:
        nonlocal unseen
        its_tokens = tokens[(chosen == number).any(axis=1)]
        count = len(its_tokens)
        # To one of a few sizes, each of which is compiled. A token of zeros stays one within the expert.
        padding = (1 << (count - 1).bit_length() if count else 1) - count
        taken, activated = _moments_in_expert(*nnx.split(expert), np.pad(its_tokens, ((0, padding), (0, 0))))
        _round_together([expert.gate_up_proj], shrunk_towards(common, np.asarray(taken), count))
        if count == 0:
            unseen += 1
            round_linear(expert.down_proj, "int4")
        else:
            _round_together([expert.down_proj], shrunk(np.asarray(activated), count))

    mixture.separate(finish)
    return unseen


def _round_layer(
    layer: nnx.Module, hidden: Float[Array, "rows tokens hidden_size"], call: LayerCall
) -> tuple[Float[Array, "rows tokens hidden_size"], int]:
    """Rounds a layer for what it takes, and gives what it then makes of that, and how many experts took nothing."""
    linears, mixtures = _named(layer, Linear), _named(layer, SparseMoE)
    graph, state = nnx.split(layer)
    _, moments, inputs = _run(graph, state, hidden, call.rows, call.rotary, observed=True)
    for names, moment in moments.items():
        in_int4 = [linears[name] for name in names if form_of(("layers", *name.split(".")), "int4") == "int4"]
        _round_together(in_int4, shrunk(np.asarray(moment), hidden.shape[0] * hidden.shape[1]))
    unseen = sum(round_experts_for_inputs(mixtures[name], x) for name, x in inputs.items())
    for name, linear in linears.items():
        if linear.scale is None:
            round_linear(linear, form_of(("layers", *name.split(".")), "int4"))
    graph, state = nnx.split(layer)
    hidden, _, _ = _run(graph, state, hidden, call.rows, call.rotary, observed=False)
    return hidden, unseen


@partial(jax.jit, static_argnames="graph")
def _moments_in_expert(graph: Any, state: Any, x: Float[Array, "tokens hidden_size"]) -> tuple[_Moments, _Moments]:
    """Of what the gate and up projection takes, and of what the down projection does."""
    return _moments(x), _moments(nnx.merge(graph, state).activated(x))


def _moments(x: Float[Array, "*rows in_features"]) -> _Moments:
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return flat.T @ flat


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
) -> tuple[
    Float[Array, "rows tokens hidden_size"],
    dict[tuple[str, ...], _Moments],
    dict[str, Float[Array, "tokens hidden_size"]],
]:
    """What a layer makes of its input; if `observed`, the moments of what its linear layers take, by the names of those
    that take it together, and what its mixtures of experts take, by name."""
    layer = nnx.merge(graph, state)
    names = {id(module): name for name, module in _named(layer, nnx.Module).items()}
    moments: dict[tuple[str, ...], Array] = {}
    inputs: dict[str, Array] = {}

    def observe(modules: tuple[nnx.Module, ...], x: Array) -> None:
        if isinstance(modules[0], SparseMoE):
            inputs[names[id(modules[0])]] = x
        else:
            moments[tuple(names[id(module)] for module in modules)] = _moments(x)

    with observing_inputs(observe):
        hidden, _ = layer(hidden, LayerCall(rows, Plan(), rotary=rotary))
    return (hidden, moments, inputs) if observed else (hidden, {}, {})


_Module = TypeVar("_Module", bound=nnx.Module)


def _named(layer: nnx.Module, kind: type[_Module]) -> dict[str, _Module]:
    """The layer's modules of a kind, by name."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(layer) if isinstance(node, kind)}
