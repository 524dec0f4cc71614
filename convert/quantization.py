"""What a config says of quantised weights, against what the files hold, which decides.

Merging a QLoRA adapter, and other ways back to floats, leave the field of the quantised model in the config.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from .reader import DTYPES
from .tensor_file import TensorInfo

_FIELDS = ("quantization", "quantization_config", "compression_config")
_FLAGS = {f"{prefix}load_in_{bits}bit": bits for prefix in ("", "_") for bits in (4, 8)}
# Tensors beside the weights that have a part in their values.
_PARTS = re.compile(r".*[._](?:scales?|biases|zeros?|zero_points?|scale_inv|g_idx|absmax|quant_map|SCB|qweight|qzeros)")
# Methods whose weights are floats in the files, but not in the model.
_ROUNDED_LATER = ("bitnet",)


def without_quantization(fields: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config without what it says of quantised weights, if all weights are floats all the same.

    Raises:
        ValueError: the config says that the weights are quantised, and they are, or are to be.

    Warns:
        UserWarning: the config says so, but they are not.
    """
    kept = {
        name: without_quantization(value, tensors) if name == "text_config" and isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in (*_FIELDS, *_FLAGS)
    }
    declared = {name: value for name, value in fields.items() if name not in kept and value}
    if not declared:
        return kept
    name, value = next(iter(declared.items()))
    method, width = _method(name, value)
    said = f"{name} has quant_method {method}{f', {width} bits' if width else ''}"
    if method in _ROUNDED_LATER or any(_is_quantized(name, info) for name, info in tensors.items()):
        raise ValueError(
            f"config: {said}, and quantised weights are not supported: convert the float32, float16 or bfloat16 "
            "model that this one was quantised from"
        )
    warnings.warn(f"config: {said}, but all weights are floats: they are converted unchanged", stacklevel=3)
    return kept


def _method(name: str, value: object) -> tuple[str, object]:
    """The method and the bits of a weight that a field names."""
    if name in _FLAGS:
        return "bitsandbytes", _FLAGS[name]
    if not isinstance(value, Mapping):
        return str(value), None
    flags = [bits for flag, bits in _FLAGS.items() if value.get(flag)]
    # Only MLX calls the field so, and names a method by its mode at most.
    unnamed = "bitsandbytes" if flags else "MLX" if name == "quantization" else "unnamed"
    return str(value.get("quant_method", unnamed)), value.get("bits") or value.get("w_bit") or next(iter(flags), None)


def _is_quantized(name: str, info: TensorInfo) -> bool:
    return bool(_PARTS.fullmatch(name)) or (name.endswith(".weight") and info.dtype not in DTYPES)
