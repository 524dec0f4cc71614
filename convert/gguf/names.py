"""What each tensor of a GGUF file is called by Hugging Face, and how its rows and numbers differ from there.

The ways in which llama.cpp's converter changes a model, undone here: the rows of queries and keys are reordered where
llama.cpp rotates neighbouring dimensions; Gemma's norms are stored with their 1; GPT-2's linear weights are transposed;
GPT-NeoX's queries, keys and values lie one after the other; experts, and StableLM's norms of heads, are stacked.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .header import StoredTensor

Change = Callable[[np.ndarray], np.ndarray]


def unchanged(tensor: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Piece:
    """One of Hugging Face's tensors, as a part of one of the file's.

    Attributes:
        source: the tensor in the file.
        index: of the part, along the tensor's leading dimensions.
        change: what is done with its numbers.
        transposed: whether that swaps its two dimensions; else it keeps the shape.
    """

    source: str
    index: tuple[int | slice, ...] = ()
    change: Change = unchanged
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """The names of one family: the file's to Hugging Face's, without `.weight` and `.bias`.

    Attributes:
        outer: of what the model has once.
        layer: of what every layer has; the file's without `blk.N.`, Hugging Face's with `prefix` and the number.
        prefix: of a layer.
        experts: of each expert's part of what is stacked or numbered, with `{}` for the expert.
        transposed: those of the file that are swapped.
    """

    outer: Mapping[str, str]
    layer: Mapping[str, str]
    prefix: str = "model.layers."
    experts: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"} | {"attn_output": "self_attn.o_proj"}
_MLP = {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = _ATTENTION | _MLP | {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_SANDWICH = _LLAMA | _NORMS_BEHIND | {"ffn_norm": "pre_feedforward_layernorm"}
_WITHOUT_MLP = {name: _LLAMA[name] for name in _LLAMA if name not in _MLP}
_MIXTRAL_EXPERTS = {
    f"ffn_{name}": f"block_sparse_moe.experts.{{}}.{weight}"
    for name, weight in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_OUTER, _LLAMA),
    "mistral": Family(_OUTER, _LLAMA),
    "mixtral": Family(_OUTER, _WITHOUT_MLP | {"ffn_gate_inp": "block_sparse_moe.gate"}, experts=_MIXTRAL_EXPERTS),
    "qwen2": Family(_OUTER, _LLAMA),
    "qwen3": Family(_OUTER, _LLAMA | _HEAD_NORMS),
    "qwen3_moe": Family(
        _OUTER,
        _WITHOUT_MLP | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"},
        experts={f"ffn_{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
    ),
    "gemma": Family(_OUTER, _LLAMA),
    "gemma2": Family(_OUTER, _SANDWICH),
    "gemma3_text": Family(_OUTER, _SANDWICH | _HEAD_NORMS),
    "phi3": Family(_OUTER, _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "granite": Family(_OUTER, _LLAMA),
    "smollm3": Family(_OUTER, _LLAMA),
    "olmo2": Family(_OUTER, _ATTENTION | _MLP | _HEAD_NORMS | _NORMS_BEHIND),
    "stablelm": Family(
        _OUTER,
        _LLAMA,
        experts={f"attn_{name}_norm": f"self_attn.{name}_layernorm.norms.{{}}" for name in "qk"},
    ),
    "gpt2": Family(
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"}
        | {"output": "lm_head"},
        {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"}
        | {"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        prefix="transformer.h.",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "gpt_neox": Family(
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        {"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"}
        | {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
        prefix="gpt_neox.layers.",
    ),
}
"""By Hugging Face's `model_type`."""

FREQUENCIES, LONG_FACTORS, SHORT_FACTORS = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
CONFIG_TENSORS = (FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are read into the config."""
# Architectures of llama.cpp in which neighbouring dimensions rotate together, not those half a head apart.
_NEIGHBOURS_ROTATE = {"llama", "granite", "smollm3"}
_NORMS_WITH_ONE = {"gemma", "gemma2", "gemma3"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")
_GATE_AND_UP = "ffn_gate_up_exps"
# More would be read as what a damaged file claims: they keep their name, and the plan reports it.
_MOST_EXPERTS = 2**12


def pieces_of(tensors: Mapping[str, StoredTensor], architecture: str, config: Mapping[str, Any]) -> dict[str, Piece]:
    """What makes up each of Hugging Face's tensors. Those of the file that are not known keep their names.

    Args:
        tensors: of the file.
        architecture: as the file names it.
        config: the model's, as `config.py` made it of the file's metadata.
    """
    family = FAMILIES[config["model_type"]]
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if name in CONFIG_TENSORS:
            continue
        change = _change(name, architecture, config)
        for target, index, transposed in _targets(name, tensor, family):
            piece = Piece(name, index, np.transpose if transposed else change, transposed)
            # Two tensors of one name are left for the plan to report.
            pieces[name if target in pieces else target] = piece
    return pieces


def _targets(name: str, tensor: StoredTensor, family: Family) -> Iterator[tuple[str, tuple[int | slice, ...], bool]]:
    """Hugging Face's names for a tensor or for its parts, with their indices and whether they are transposed."""
    match = _NAME.fullmatch(name)
    if match is None:
        yield name, (), False
        return
    stem, layer, expert, kind = match["stem"], match["layer"], match["expert"], match["kind"]
    prefix = "" if layer is None else f"{family.prefix}{layer}."
    plain = (family.outer if layer is None else family.layer).get(stem)
    stacked = None if layer is None else family.experts.get(stem.removesuffix("_exps"))
    if expert is None and tensor.shape[0] > _MOST_EXPERTS:
        stacked = None
    if stacked and expert is not None:
        yield f"{prefix}{stacked.format(expert)}.{kind}", (), False
    elif expert is not None:
        yield name, (), False
    elif stacked:
        for index in range(tensor.shape[0]):
            yield f"{prefix}{stacked.format(index)}.{kind}", (index,), False
    elif stem == _GATE_AND_UP and family.experts and len(tensor.shape) == 3 and tensor.shape[0] <= _MOST_EXPERTS:
        middle = tensor.shape[1] // 2
        for index in range(tensor.shape[0]):
            for part, rows in (("ffn_gate", slice(None, middle)), ("ffn_up", slice(middle, None))):
                yield f"{prefix}{family.experts[part].format(index)}.{kind}", (index, rows), False
    elif plain:
        yield f"{prefix}{plain}.{kind}", (), stem in family.transposed and len(tensor.shape) == 2
    else:
        yield name, (), False


def _change(name: str, architecture: str, config: Mapping[str, Any]) -> Change:
    if architecture in _NORMS_WITH_ONE and name.endswith("norm.weight"):
        return _without_one
    if architecture in _NEIGHBOURS_ROTATE and ".attn_q." in name:
        return partial(_halves_apart, heads=config["num_attention_heads"])
    if architecture in _NEIGHBOURS_ROTATE and ".attn_k." in name:
        return partial(_halves_apart, heads=config["num_key_value_heads"])
    if architecture == "gptneox" and ".attn_qkv." in name:
        return partial(_head_by_head, heads=config["num_attention_heads"])
    return unchanged


def _without_one(norm: np.ndarray) -> np.ndarray:
    return (norm.astype(np.float32) - 1).astype(norm.dtype)


def _halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Of each head the even rows, then the odd ones."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _head_by_head(rows: np.ndarray, heads: int) -> np.ndarray:
    """All queries, then all keys, then all values to the first head's query, key and value, then the next's."""
    parts = rows.reshape(3, heads, -1, *rows.shape[1:])
    return parts.swapaxes(0, 1).reshape(rows.shape)
