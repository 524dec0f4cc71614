"""Rounded weights: linear layers, experts of mixtures and convolutions whose kernel is bfloat16, or int8 or int4 with a
scale for a group of its inputs.

A rounded weight is a float without loss, so that a product is exact but for the order of its sums, unless activations
are rounded too (`activations`), which int8 weights allow: then more rows than a few are integers, in all layers but the
output layer. An output layer tied to the embeddings is rounded with them, in int8 with a scale for every 32 inputs;
other embeddings, norms and biases keep their dtype. The projections of values have the next wider format, bfloat16 with
int8 and int8 with int4: their outputs are small beside their inputs, so that rounding costs them most, and they are 3%
of a decoder's weights. So have with int4 the layers outside of the model's stack, such as an output layer, whose errors
are those of the logits themselves, convolutions and patch embeddings, and the routers of experts.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int8

from .activations import LEVELS
from .decoder import CausalLM
from .int4 import INT4_GROUP, Rounded, quantize_int4
from .modules import Convolution, Embedding, Linear
from .moe import Expert, SparseMoE
from .panels import pack, pack_int4

FORMATS = ("bfloat16", "int8", "int4")
GROUP = 64
"""Inputs of a linear layer in int8 that share a scale, where there are whole groups of them; else all."""
TIED_GROUP = 32
"""The same of an output layer that is tied to the embeddings, whose errors are those of the logits themselves."""
GROUPS = {"int8": GROUP, "int4": INT4_GROUP}
"""Inputs of a linear layer that share a scale, by the format of the model's weights."""
_LARGEST = 127
_OUTPUT = "lm_head"
"""The name of a decoder's output layer."""
_SENSITIVE, _ROUTER = "v_proj", "gate"
"""The names of layers that have the next wider format; routers only in place of int4."""
_WIDER = {"bfloat16": "bfloat16", "int8": "bfloat16", "int4": "int8"}
_STACK = "layers"
"""The name of the list that has a model's layers."""


def round_weights(model: nnx.Module, form: str, activations: str = "same") -> Any:
    """The model with every `Linear`, `Convolution` and `Expert` rounded, which shares everything else with the given
    model.

    Args:
        model: the model, which stays as it is. Layers of it that are integers already stay, too.
        form: one of `FORMATS`.
        activations: one of `activations.LEVELS`: what the layers with int8 weights round their inputs to, but for
            convolutions, whose inputs are the model's own.
    """
    rounded = nnx.merge(*nnx.split(model))
    for path, node in [*nnx.iter_graph(rounded)]:
        if isinstance(node, SparseMoE) and node.experts is None:
            round_experts(node, form_of(path, form))
    for path, node in nnx.iter_graph(rounded):
        if not isinstance(node, Linear):
            continue
        if node.scale is None:
            round_linear(node, form_of(path, form))
        # The errors of an output layer are those of the logits themselves.
        if node.scale is not None and path != (_OUTPUT,) and not isinstance(node, Convolution):
            node.levels = LEVELS[activations]
    if isinstance(rounded, CausalLM) and rounded.lm_head is None:
        _round_tied(rounded.model.embed_tokens, form)
    return rounded


def form_of(path: tuple[Any, ...], form: str) -> str:
    """The format of a linear layer by its place in a model whose weights are rounded to `form`."""
    name = path[-1] if path else ""
    outside = len(path) > 0 and _STACK not in path
    sensitive = name == _SENSITIVE or (form == "int4" and (outside or name == _ROUTER))
    return _WIDER[form] if sensitive else form


def set_int4(linear: Linear, rounded: Rounded) -> None:
    """Gives a layer a kernel of int4 and its scales."""
    numbers, scale = rounded
    linear.kernel, linear.scale = nnx.Param(jnp.asarray(pack_int4(numbers))), nnx.Param(jnp.asarray(scale))


def round_experts(experts: SparseMoE, form: str) -> None:
    """Rounds all experts to a format, each weight to its nearest; floats of one are held at a time."""

    def finish(_: int, expert: Expert) -> None:
        round_linear(expert.gate_up_proj, form)
        round_linear(expert.down_proj, form)

    experts.separate(finish)


def round_linear(linear: Linear, form: str) -> None:
    """Rounds a layer's kernel to a format, each weight to its nearest."""
    if form == "bfloat16":
        linear.kernel = nnx.Param(linear.kernel[...].astype(jnp.bfloat16))
        return
    kernel = np.asarray(linear.weight, np.float32)
    if form == "int4":
        set_int4(linear, quantize_int4(kernel))
        return
    linear.kernel, linear.scale = _panels(kernel, GROUP)


def _round_tied(table: Embedding, form: str) -> None:
    if form == "bfloat16":
        table.embedding = nnx.Param(table.embedding[...].astype(jnp.bfloat16))
        return
    table.embedding, table.scale = _panels(np.asarray(table.embedding[...], np.float32).T, TIED_GROUP)


def _panels(kernel: Float32[np.ndarray, "in_features out_features"], group: int) -> tuple[nnx.Param, nnx.Param]:
    rounded, scale = quantize_kernel(kernel, group)
    return nnx.Param(jnp.asarray(pack(rounded))), nnx.Param(jnp.asarray(scale))


def scale_groups(in_features: int, group: int = GROUP) -> int:
    """Groups of inputs that have a scale each for every output, in int8."""
    return max(in_features // group, 1) if in_features % group == 0 else 1


def quantize_kernel(
    kernel: Float32[np.ndarray, "in_features out_features"], group: int = GROUP
) -> tuple[Int8[np.ndarray, "in_features out_features"], Float32[np.ndarray, "groups out_features"]]:
    """int8 and scales with `|kernel - int8 * scale| <= scale / 2`, the largest weight of each group being 127.

    Symmetric: 0 stays 0. A group of zeros has scale 1.
    """
    features, outputs = kernel.shape
    groups = scale_groups(features, group)
    grouped = kernel.reshape(groups, features // groups, outputs)
    # A denormal scale would be 0 where the product is computed.
    largest = np.abs(grouped).max(axis=1, initial=0.0)
    scale = np.where(largest > _LARGEST * np.finfo(np.float32).tiny, largest / np.float32(_LARGEST), np.float32(1))
    rounded = np.clip(np.rint(grouped / scale[:, None]), -_LARGEST, _LARGEST)
    return rounded.reshape(kernel.shape).astype(np.int8), scale.astype(np.float32)
