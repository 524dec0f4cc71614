"""The share of keys attended, against counting the non-zero weights of the attention matrix itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import Exact, LowRank, TwoStage
from iceformer.attention.coverage import keys_attended

from .calls import attend
from .reference import random_inputs

run = jax.jit(attend, static_argnums=0)


@pytest.mark.parametrize(
    ("length", "exact_last_block", "crossover"),
    [
        (90, True, 0),
        *(pytest.param(length, last, 0, marks=pytest.mark.slow) for length in (40, 96) for last in (True, False)),
        pytest.param(90, False, 0, marks=pytest.mark.slow),
        pytest.param(90, True, 60, marks=pytest.mark.slow),
        (90, False, 92),
    ],
)
def test_counts_what_is_attended(length, exact_last_block, crossover) -> None:
    config = TwoStage(
        method=LowRank(rank=4),
        budget=40,
        query_block=8,
        key_block=4,
        sink=4,
        local=4,
        exact_last_block=exact_last_block,
        crossover=crossover,
    )
    query, key, _ = random_inputs(0, 1, 1, 1, 96, 96, 4)
    weights = run(
        config,
        jnp.asarray(query),
        jnp.asarray(key),
        jnp.eye(96)[None, None],
        offset=jnp.zeros(1, jnp.int32),
        lengths=jnp.full(1, length),
        basis=jnp.broadcast_to(jnp.eye(4), (1, 2, 4, 4)),
    )
    attended = np.count_nonzero(np.asarray(weights)[0, 0, :length])
    assert keys_attended(config, length) == pytest.approx(attended / (length * (length + 1) / 2), abs=1e-12)


def test_exact_attention_reads_every_key() -> None:
    assert keys_attended(Exact(), 1000) == 1.0
    assert keys_attended(TwoStage(budget=1024), 1000) == 1.0
    assert keys_attended(TwoStage(budget=1024, crossover=3000), 3000) == 1.0
