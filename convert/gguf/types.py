"""The types of ggml's tensors: their blocks, and their numbers as floats, by the `gguf` package."""

from pathlib import Path

import ml_dtypes
import numpy as np

# As safetensors names them. These are not quantised: what a file holds so, the checkpoint holds so too.
PLAIN = {
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    24: ("I8", np.dtype("<i1")),
    25: ("I16", np.dtype("<i2")),
    26: ("I32", np.dtype("<i4")),
    27: ("I64", np.dtype("<i8")),
    28: ("F64", np.dtype("<f8")),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What quantised tensors may become, to safetensors' names."""
_NUMPY = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
_CHUNK_BYTES = 2**22


def need_gguf(path: Path) -> None:
    """ModuleNotFoundError, with what to install, where the `gguf` package is not."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ModuleNotFoundError(
            f"{path} can only be read with gguf: pip install 'iceformer[gguf]'", name="gguf"
        ) from error


def block_of(number: int) -> tuple[int, int] | None:
    """How many numbers a block of a type has, and how many bytes; None for a type that is not known."""
    import gguf

    return {int(known): size for known, size in gguf.GGML_QUANT_SIZES.items()}.get(number)


def type_name(number: int) -> str:
    """A type's name, e.g. Q4_K."""
    import gguf

    return gguf.GGMLQuantizationType(number).name


def is_readable(number: int) -> bool:
    """Whether the numbers of a type can be had."""
    if number in PLAIN:
        return True
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def to_numbers(raw: np.ndarray, number: int, dtype: str) -> np.ndarray:
    """The numbers of a tensor or of a part of one.

    Args:
        raw: the bytes, [..., bytes of a row].
        number: the type.
        dtype: of the result where the type is a quantised one.
    """
    if number in PLAIN:
        return np.array(raw, order="C").view(PLAIN[number][1])
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    columns = raw.shape[-1] // size * elements
    rows = raw.reshape(-1, raw.shape[-1])
    result = np.empty((len(rows), columns), _NUMPY[dtype])
    step = max(_CHUNK_BYTES // (4 * columns), 1)
    # Corrupt scales and casts may overflow: values that are not finite are found by those who use them.
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            chunk = np.ascontiguousarray(rows[start : start + step])
            result[start : start + step] = gguf.quants.dequantize(chunk, gguf.GGMLQuantizationType(number))
    return result.reshape(*raw.shape[:-1], columns)
