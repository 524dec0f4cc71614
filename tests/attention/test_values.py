"""The benchmark's floor: each query has the value of its own token."""

import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import Rows, Values, attend

from .calls import scattered
from .reference import random_inputs


@pytest.mark.parametrize("page", [0, 128])
def test_each_query_has_the_value_of_its_own_token(page: int) -> None:
    query, key, value = map(jnp.asarray, random_inputs(0, 2, 4, 2, 20, 256, 8))
    keys, slot = scattered(key, value, page, 1)
    offset = jnp.array([100, 236], jnp.int32)
    output = attend(Values(), query, keys, Rows(slot, offset, offset + 20))
    expected = [np.repeat(value[row, :, start : start + 20], 2, axis=0) for row, start in enumerate((100, 236))]
    np.testing.assert_array_equal(output, expected)
