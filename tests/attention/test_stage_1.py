"""Stage 1's ranking of key blocks against numpy, with so few candidates that the ranking alone decides."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer import kernels
from iceformer.attention import LowRank, MeanPool, TwoStage

from ..few import few
from .calls import two_stage_attention
from .reference import random_inputs

KEYS, HEAD_DIM, RANK, BLOCK, KEY_BLOCK, BUDGET, SINK, LOCAL = 320, 16, 8, 8, 4, 48, 3, 5
SHARE = 0.5
CONFIG: dict[str, Any] = {
    "budget": BUDGET,
    "query_block": BLOCK,
    "key_block": KEY_BLOCK,
    "candidates": 1.0,
    "sink": SINK,
    "local": LOCAL,
    "exact_last_block": False,
}


def low_rank_logits(query: np.ndarray, key: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """[blocks, queries]: the largest product in int8 of the queries of the largest norm with a key of each block."""
    projected_key = np.clip(np.round(key @ basis[1]), -127, 127)
    projected = query @ basis[0]
    norms = np.linalg.norm(projected, axis=1)
    projected = projected[np.argsort(-norms)[: int(np.ceil(SHARE * BLOCK))]]
    unit = np.abs(projected).max(axis=1) / 127
    products = projected_key @ np.round(projected / unit[:, None]).T * unit
    return products.reshape(-1, KEY_BLOCK, len(unit)).max(axis=1)


def mean_pool_logits(query: np.ndarray, key: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return key.reshape(-1, KEY_BLOCK, HEAD_DIM).mean(axis=1) @ query.T


METHODS = {
    "low_rank": (LowRank(rank=RANK, query_share=SHARE), low_rank_logits),
    "mean_pool": (MeanPool(), mean_pool_logits),
}


def importance(logits: np.ndarray) -> np.ndarray:
    """The log of the largest softmax weight that a query gives to each block."""
    largest = logits.max(axis=0)
    return (logits - largest - np.log(np.exp(logits - largest).sum(axis=0))).max(axis=1)


def fits(chosen: np.ndarray, ranks: np.ndarray) -> bool:
    """Whether no block that was left out ranks above one that was chosen, but for rounding."""
    return ranks[chosen].min() > ranks[~chosen].max() - 1e-3


@pytest.mark.parametrize(
    ("method", "causal", "scale", "softcap"),
    few(
        [
            (method, *call)
            for method in METHODS
            for call in [
                (True, None, None),
                (False, 0.3, 1.0),
                (True, 0.02, None),
                (False, None, None),
                (True, 0.3, 1.0),
            ]
        ],
        [("low_rank", False, 0.3, 1.0), ("mean_pool", True, None, None)],
    ),
)
def test_the_best_blocks_are_the_candidates(
    form: str, method: str, causal: bool, scale: float | None, softcap: float | None
) -> None:
    made, estimate = METHODS[method]
    if form == "kernels" and method != "low_rank":
        pytest.skip("runs in XLA only")
    rng = np.random.default_rng(1)
    query, key, _ = random_inputs(0, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
    query *= rng.lognormal(0, 0.7, (2, 4, KEYS, 1)).astype(np.float32)
    directions = np.linalg.qr(rng.standard_normal((2, HEAD_DIM, RANK)))[0]
    basis = np.stack([directions / 20, directions * 20], axis=1).astype(np.float32)
    # Fewer queries are left in the second row's last block than rank.
    lengths = np.array([KEYS, 218], np.int32)
    identity = jnp.broadcast_to(jnp.eye(KEYS), (2, 2, KEYS, KEYS))
    factor = HEAD_DIM**-0.5 if scale is None else scale

    @jax.jit
    def call(*arrays: jax.Array) -> jax.Array:
        return two_stage_attention(
            TwoStage(method=made, **CONFIG),
            *arrays,
            offset=jnp.zeros(2, jnp.int32),
            lengths=jnp.asarray(lengths),
            basis=jnp.asarray(basis),
            causal=causal,
            scale=scale,
            softcap=softcap,
        )

    def check(where: str) -> None:
        attended = np.asarray(call(jnp.asarray(query), jnp.asarray(key), identity)).reshape(
            2, 4, KEYS // BLOCK, BLOCK, KEYS
        )
        told, without_scale, without_cap = 0, 0, 0
        for row, head, block in itertools.product(range(2), range(4), range(KEYS // BLOCK)):
            length, first = int(lengths[row]), block * BLOCK
            if first >= length or (causal and first + BLOCK <= BUDGET):
                continue
            queries = np.s_[first : min(first + BLOCK, length)]
            forced_start = max(first - LOCAL, 0) // KEY_BLOCK * KEY_BLOCK
            forced_end = first + BLOCK if causal else min(first + BLOCK + LOCAL, length)
            ranked = (forced_start if causal else length) // KEY_BLOCK
            kv_head, of_block = head // 2, query[row, head, queries].astype(np.float64)
            seen = key[row, kv_head, : ranked * KEY_BLOCK].astype(np.float64)
            logits = estimate(of_block, seen, basis[kv_head].astype(np.float64))
            keys = np.asarray(attended[row, head, block].any(axis=0))
            chosen = np.asarray(keys.reshape(-1, KEY_BLOCK).any(axis=1))[:ranked]
            start = np.arange(ranked) * KEY_BLOCK
            forced = (start < SINK) | ((start >= forced_start) & (start < forced_end))
            assert chosen[forced].all()
            assert chosen.sum() > forced.sum()
            capped = logits * factor if softcap is None else softcap * np.tanh(logits * factor / softcap)
            assert fits(chosen[~forced], importance(capped)[~forced]), f"{where}, row {row}, head {head}, block {block}"
            told += 1
            without_scale += not fits(chosen[~forced], importance(logits)[~forced])
            without_cap += not fits(chosen[~forced], importance(logits * factor)[~forced])
        # The cases can tell a ranking without the scale, or without the cap, from the right one.
        assert told > 60
        assert without_scale > 3
        assert softcap is None or without_cap > 3

    if form == "xla":
        check("XLA")
        return
    for instruction_set in kernels.instruction_sets():
        with kernels.using(instruction_set):
            check(instruction_set)
