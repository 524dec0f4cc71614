"""Rounded weights: linear layers whose kernel is bfloat16, or int8 with a scale for every 64 inputs of each output.

A rounded weight is a float without loss, so that a product is exact but for the order of its sums, unless activations
are rounded too (`activations`), which int8 weights allow: then more rows than a few are integers, in all layers but the
output layer. An output layer tied to the embeddings is rounded with them, in int8 with a scale for every 32
inputs; other embeddings, norms and biases keep their dtype. With int8, the projections of values become bfloat16: their
outputs are small beside their inputs, so that rounding costs them most, and they are 3% of a decoder's weights.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int8

from .activations import LEVELS
from .decoder import CausalLM
from .modules import Embedding, Linear
from .panels import pack

FORMATS = ("bfloat16", "int8")
GROUP = 64
"""Inputs of a linear layer that share a scale, where there are whole groups of them; else all."""
TIED_GROUP = 32
"""The same of an output layer that is tied to the embeddings, whose errors are those of the logits themselves."""
_LARGEST = 127
_SENSITIVE = "v_proj"
"""The name of layers that stay bfloat16 at least."""
_OUTPUT = "lm_head"
"""The name of a decoder's output layer."""


def round_weights(model: nnx.Module, form: str, activations: str = "same") -> Any:
    """The model with every `Linear` rounded, which shares everything else with the given model.

    Args:
        model: the model, which stays as it is.
        form: one of `FORMATS`.
        activations: one of `activations.LEVELS`: what the layers with int8 weights round their inputs to.
    """
    rounded = nnx.merge(*nnx.split(model))
    for path, node in nnx.iter_graph(rounded):
        if isinstance(node, Linear):
            _round(node, "bfloat16" if path[-1:] == (_SENSITIVE,) else form)
            # The errors of an output layer are those of the logits themselves.
            if node.scale is not None and path != (_OUTPUT,):
                node.levels = LEVELS[activations]
    if isinstance(rounded, CausalLM) and rounded.lm_head is None:
        _round_tied(rounded.model.embed_tokens, form)
    return rounded


def _round(linear: Linear, form: str) -> None:
    if form == "bfloat16":
        linear.kernel = nnx.Param(linear.kernel[...].astype(jnp.bfloat16))
        return
    linear.kernel, linear.scale = _panels(np.asarray(linear.kernel[...], np.float32), GROUP)


def _round_tied(table: Embedding, form: str) -> None:
    if form == "bfloat16":
        table.embedding = nnx.Param(table.embedding[...].astype(jnp.bfloat16))
        return
    table.embedding, table.scale = _panels(np.asarray(table.embedding[...], np.float32).T, TIED_GROUP)


def _panels(kernel: Float32[np.ndarray, "in_features out_features"], group: int) -> tuple[nnx.Param, nnx.Param]:
    rounded, scale = quantize_kernel(kernel, group)
    return nnx.Param(jnp.asarray(pack(rounded))), nnx.Param(jnp.asarray(scale))


def scale_groups(in_features: int, group: int = GROUP) -> int:
    """Groups of inputs that have a scale each for every output."""
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
