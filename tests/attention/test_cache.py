"""The KV cache: what a write puts where."""

import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention.cache import LayerCache, write

from .reference import random_inputs

CAPACITY, TOKENS, HEAD_DIM, RANK = 20, 3, 8, 5
OFFSETS = (4, 0, 17)


@pytest.fixture(autouse=True, scope="module")
def form() -> None:
    """The cache is the same in both forms."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_is_written_at_its_own_offset_and_nowhere_else(dtype: str) -> None:
    _, key, value = random_inputs(0, 3, 2, 2, 1, TOKENS, HEAD_DIM)
    basis = np.random.default_rng(1).standard_normal((2, 2, HEAD_DIM, RANK)).astype(np.float32)
    basis[:, 1] *= 20
    full = LayerCache(
        jnp.full((3, 2, CAPACITY, HEAD_DIM), 7, dtype),
        jnp.full((3, 2, CAPACITY, HEAD_DIM), 8, dtype),
        jnp.full((3, 2, CAPACITY, 8), 9, jnp.int8),
    )
    new_key, new_value = (jnp.asarray(x, dtype) for x in (key, value))
    written = write(full, new_key, new_value, jnp.array(OFFSETS, jnp.int32), jnp.asarray(basis))
    # What stage 1 keeps of a key: its projection by the second half of the basis, rounded, and zeros up to 8.
    wide_key, wide_basis = (np.asarray(x.astype(jnp.float32), np.float64) for x in (new_key, jnp.asarray(basis, dtype)))
    projected = np.clip(np.round(wide_key @ wide_basis[:, 1]), -127, 127)
    assert len(np.unique(projected)) > 20
    news = (new_key, new_value, np.pad(projected, ((0, 0), (0, 0), (0, 0), (0, 8 - RANK))))
    for buffer, new, before in zip(written, news, full, strict=True):
        assert buffer is not None
        assert before is not None
        assert buffer.dtype == before.dtype
        expected = np.array(before.astype(jnp.float32))
        for row, offset in enumerate(OFFSETS):
            expected[row, :, offset : offset + TOKENS] = np.asarray(new, np.float32)[row]
        np.testing.assert_array_equal(np.asarray(buffer.astype(jnp.float32)), expected)


def test_a_cache_with_projected_keys_is_not_written_without_their_basis() -> None:
    buffers = jnp.zeros((1, 1, 4, 8))
    cache = LayerCache(buffers, buffers, jnp.zeros((1, 1, 4, 8), jnp.int8))
    with pytest.raises(ValueError, match="needs the basis that projects them"):
        write(cache, buffers[:, :, :1], buffers[:, :, :1], jnp.zeros(1, jnp.int32))
