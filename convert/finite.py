"""Whether arrays are finite, by their bits: numpy has no fast way for bfloat16."""

from typing import Any

import ml_dtypes
import numpy as np

_EXPONENTS: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int]] = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
}
_CHUNK = 2**20


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of floating-point numbers has no NaN and no infinity."""
    if array.dtype not in _EXPONENTS:
        return bool(np.isfinite(array).all())
    bits, exponent = _EXPONENTS[array.dtype]
    flat = array.reshape(-1).view(bits)
    return not any(
        ((flat[start : start + _CHUNK] & exponent) == exponent).any() for start in range(0, flat.size, _CHUNK)
    )
