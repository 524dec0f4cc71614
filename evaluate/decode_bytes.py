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
from ..model.rounding import GROUP, TIED_GROUP, scale_groups

_FORMS = ("llama", "qwen2", "qwen3", "granite")
"""Kinds of model that the formulas fit: four attention projections and a gated MLP in every layer."""
_SCALE = 4
"""Bytes of a float32 scale."""


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
    def linear(self) -> int:
        """Weights of the layers' matrices."""
        projections = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (projections + 3 * self.hidden * self.mlp)

    @property
    def value_projections(self) -> int:
        """Weights of the matrices that make values."""
        return self.layers * self.hidden * self.head_dim * self.kv_heads

    @property
    def scales(self) -> int:
        """Scales of the layers' matrices in int8."""
        queries, keys = self.head_dim * self.heads, self.head_dim * self.kv_heads
        from_hidden = scale_groups(self.hidden) * (queries + keys + 2 * self.mlp)
        to_hidden = (scale_groups(queries) + scale_groups(self.mlp)) * self.hidden
        return self.layers * (from_hidden + to_hidden)

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
        weights: "same", "bfloat16" or "int8", as `iceformer.compile` takes it.
    """
    form = dtype if weights == "same" else weights
    linear, output = sizes.linear * _size(form), sizes.output * _size(form)
    if form == "int8":
        linear += sizes.value_projections + sizes.scales * _SCALE
        output += scale_groups(sizes.hidden, TIED_GROUP if sizes.tied else GROUP) * sizes.vocab * _SCALE
    return linear + output + sizes.norms * _size(dtype)


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


def _size(dtype: str) -> int:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
