"""A transformers model in the form of another engine, so that the engine runs the same weights.

`python -m iceformer.evaluate.exports ENGINE SOURCE TARGET DTYPE` reads the Hugging Face folder SOURCE and writes the
folder TARGET: token ids [1, n] in, for any n, the logits [1, vocab] of the last token out, and causal attention with no
mask array. It is a process of its own, so that what torch takes to export does not count as the engine's memory.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from ..host.files import new_folder
from .engines import ONNX_MODEL, OPENVINO_MODEL

_ONNX_OPSET = 23
_EXAMPLE_TOKENS = 64


class LastLogits(torch.nn.Module):
    """A causal language model as a function from token ids to the last token's logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 [1, vocab] of ids int64 [1, n]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def export_openvino(source: Path, folder: Path, dtype: str) -> None:
    """Writes OpenVINO's form of a model, weights in `dtype`, attention as its scaled dot-product operation."""
    import openvino

    model = _load(source, dtype, _torch_attention)
    converted = openvino.convert_model(model, example_input=_example(model), input=[1, -1])
    openvino.save_model(converted, folder / OPENVINO_MODEL, compress_to_fp16=False)


def export_onnx(source: Path, folder: Path, dtype: str) -> None:
    """Writes a model as ONNX, attention as ONNX Runtime's GroupQueryAttention.

    That is its fused attention for causal models. ONNX's own Attention operation holds [heads, n, n] scores in
    ONNX Runtime, which takes twice as long.
    """
    model = _load(source, dtype, _group_query_attention)
    length = torch.export.Dim("length", min=2, max=2**20)
    program = torch.onnx.export(
        model,
        (_example(model),),
        dynamo=True,
        opset_version=_ONNX_OPSET,
        input_names=["ids"],
        dynamic_shapes=({1: length},),
        verbose=False,
    )
    assert program is not None
    program.save(folder / ONNX_MODEL, external_data=True)


EXPORTS: dict[str, Callable[[Path, Path, str], None]] = {"openvino": export_openvino, "onnxruntime": export_onnx}
"""Exports by the engine that runs them."""


def _torch_attention(module: Any, query: Any, key: Any, value: Any, mask: None, scaling: float, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return attended.transpose(1, 2), None


def _group_query_attention(module: Any, query: Any, key: Any, value: Any, mask: None, scaling: float, **_: Any) -> Any:
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    flat = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value)]
    last = torch.full((batch,), length - 1, dtype=torch.int32)
    total = torch.full((), length, dtype=torch.int32)
    cache = (batch, kv_heads, length, head_dim)
    attended, _key, _value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, None, None, last, total),
        {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scaling},
        dtypes=(query.dtype,) * 3,
        shapes=((batch, length, heads * head_dim), cache, cache),
        version=1,
    )
    return attended.reshape(batch, length, heads, head_dim), None


def _load(source: Path, dtype: str, attention: Callable[..., Any]) -> LastLogits:
    """The model with an attention that is causal by itself and given no mask."""
    AttentionInterface.register("causal", attention)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, dtype), attn_implementation="causal", local_files_only=True
    )
    return LastLogits(model.eval()).eval()


def _example(model: torch.nn.Module) -> torch.Tensor:
    return torch.arange(_EXAMPLE_TOKENS)[None] % 2


def main(engine: str, source: str, target: str, dtype: str) -> None:
    """Exports a model into a new folder."""
    with torch.inference_mode(), new_folder(Path(target)) as folder:
        EXPORTS[engine](Path(source), folder, dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
