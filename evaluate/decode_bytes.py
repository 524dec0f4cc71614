"""How many bytes decoding reads for a token, by formula, from a model's config and an engine's number formats.

Counted are the weights that every token needs, and keys, values and what a selection reads of the keys' index.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..attention import DecodeSelection
from ..model.int4 import group_size
from ..model.rounding import GROUP, TIED_GROUP, form_of, scale_groups

_FORMS = ("llama", "qwen2", "qwen3", "granite")
"""Kinds of model that the formulas fit: four attention projections and a gated MLP in every layer."""
_SCALE, _INT4_SCALE = 4, 2
"""Bytes of a float32 scale, and of the bfloat16 one of int4."""


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder that decide what a token reads.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, mlp, vocab: as in the model's config.
        tied: whether the output layer is the embedding.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "DecoderSizes | None":
        """The sizes in a config.json; None for a kind of model that the formulas do not fit."""
        if config["model_type"] not in _FORMS or config.get("use_sliding_window"):
            return None
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by their names."""
        queries, keys = self.head_dim * self.heads, self.head_dim * self.kv_heads
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def output(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.hidden

    @property
    def norms(self) -> int:
        """Weights of the norms."""
        return (2 * self.layers + 1) * self.hidden


def weight_bytes(sizes: DecoderSizes, dtype: str, weights: str) -> int:
    """Bytes of our weights that a token reads.

    Args:
        sizes: of the model.
        dtype: "float32" or "bfloat16", of what is not a linear layer.
        weights: "same", "bfloat16", "int8" or "int4", as `iceformer.compile` takes it.
    """
    if weights == "same":
        return (sizes.linear + sizes.output + sizes.norms) * _size(dtype)
    linear = sum(_matrix_bytes(*shape, form_of(("layers", name), weights)) for name, shape in sizes.matrices.items())
    form = form_of(("lm_head",), weights)
    output = _matrix_bytes(sizes.hidden, sizes.vocab, form, TIED_GROUP if sizes.tied else GROUP)
    return sizes.layers * linear + output + sizes.norms * _size(dtype)


def file_bytes(sizes: DecoderSizes, size: int) -> int:
    """Bytes that a token reads of a file with all weights: without the embedding, if the output layer is another."""
    used = sizes.linear + sizes.output + sizes.norms
    return size * used // (used if sizes.tied else used + sizes.output)


def cache_bytes(sizes: DecoderSizes, depth: int, kv: str, scale_bytes: int = 0) -> int:
    """Bytes of the keys and values of a row that attends to all of them.

    Args:
        sizes: of the model.
        depth: keys, in tokens.
        kv: number format of keys and values.
        scale_bytes: beside each key and each value of a head, of scales and zero points.
    """
    return sizes.layers * _layer_bytes(sizes, depth, kv, scale_bytes)


def our_cache_bytes(sizes: DecoderSizes, depth: int, kv: str, selection: DecodeSelection | None = None) -> int:
    """The same in our engines, where int8 has a float32 scale; with a selection, its index and the chosen keys,
    on average over the tokens that share a choice."""
    scale = _SCALE if kv == "int8" else 0
    if selection is None or depth <= selection.exact_keys:
        return cache_bytes(sizes, depth, kv, scale)
    exact = min(selection.exact_layers, sizes.layers)
    index = sum(
        math.prod(field.shape) * _size(field.dtype) / field.tokens
        for field in selection.fields(sizes.head_dim).values()
    )
    ranked = round(depth * sizes.kv_heads * index / selection.refresh)
    chosen = _layer_bytes(sizes, selection.budget, kv, scale) + ranked
    return exact * _layer_bytes(sizes, depth, kv, scale) + (sizes.layers - exact) * chosen


def _layer_bytes(sizes: DecoderSizes, depth: int, kv: str, scale_bytes: int) -> int:
    return 2 * depth * sizes.kv_heads * (sizes.head_dim * _size(kv) + scale_bytes)


def _matrix_bytes(inputs: int, outputs: int, form: str, group: int = GROUP) -> int:
    """Bytes of a matrix in a format, with its scales; `group` is of int8."""
    if form == "int4":
        return inputs * outputs // 2 + inputs // group_size(inputs) * outputs * _INT4_SCALE
    scales = scale_groups(inputs, group) * outputs * _SCALE if form == "int8" else 0
    return inputs * outputs * _size(form) + scales


def _size(dtype: str) -> int:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
