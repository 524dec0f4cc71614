"""Calibrating on a short text for long rows: queries and keys as they would be further on."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from iceformer.attention import LowRank, TwoStage
from iceformer.attention.methods.low_rank import KEY_PROJECTION
from iceformer.deploy.calibration import _PLACES, _at_places, _moves, calibrate
from iceformer.model.registry import build
from iceformer.model.rope import Rope, apply_rotary, rotary_tables

from ..conftest import TINY_LLAMA
from ..few import few

TOKENS, HEAD_DIM = 12, 16
ROPES = {
    "plain": Rope(),
    "half of a head": Rope(partial_rotary_factor=0.5),
    "stretched and scaled": Rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.25
    ),
}


def rotated(x: np.ndarray, rope: Rope, start: int) -> np.ndarray:
    positions = jnp.arange(start, start + TOKENS)[None]
    tables = rotary_tables(rope, HEAD_DIM, positions, jnp.full(1, TOKENS, jnp.int32))
    return np.asarray(apply_rotary(jnp.asarray(x)[None], tables)[0])


@pytest.mark.parametrize("rope", few(ROPES.values(), [ROPES["half of a head"]]), ids=ROPES)
def test_tokens_are_what_they_would_be_at_later_positions(rope: Rope) -> None:
    x = np.random.default_rng(0).standard_normal((2, TOKENS, HEAD_DIM)).astype(np.float32)
    moved = _at_places(jnp.asarray(rotated(x, rope, 0)), _moves(rope, HEAD_DIM, TOKENS, TOKENS + 300))
    assert moved.shape == (2, _PLACES * TOKENS, HEAD_DIM)
    for place, start in enumerate((0, 100, 200, 300)):
        expected = rotated(x, rope, start)
        np.testing.assert_allclose(moved[:, place * TOKENS : (place + 1) * TOKENS], expected, atol=1e-4)


def test_without_rotation_or_room_they_stay_as_they_are() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, TOKENS, HEAD_DIM)), jnp.float32)
    np.testing.assert_array_equal(_at_places(x, _moves(None, HEAD_DIM, TOKENS, TOKENS + 300)), x)
    np.testing.assert_array_equal(_at_places(x, _moves(Rope(), HEAD_DIM, TOKENS, TOKENS)), x)


def test_a_projection_from_a_short_text_keeps_logits_far_into_a_long_row() -> None:
    """Of 6 of 16 dimensions, which a short text alone chooses for its own positions."""
    architecture, config = build(TINY_LLAMA | {"model_type": "llama"})
    config = replace(config, ropes=(Rope(),) * len(config.ropes))
    model: Any = architecture.module(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, TINY_LLAMA["vocab_size"], (1, 400), np.int32)
    attention, short = TwoStage(LowRank(rank=6)), ids[:, :24]
    query, key = model.queries_and_keys(jnp.asarray(ids), jnp.full(1, 400, jnp.int32))[0]

    def lost(longest: int) -> float:
        constants = calibrate(model, [attention], short, 24, longest=longest)[0]
        far_query, far_key = query[0, :, 300:].astype(jnp.float32), key[0, :, 100:300].astype(jnp.float32)
        group = far_query.shape[0] // far_key.shape[0]
        of_queries, of_keys = (jnp.repeat(constants[name], group, 0) for name in ("query_projection", KEY_PROJECTION))
        logits = jnp.einsum("hqd,hkd->hqk", far_query, jnp.repeat(far_key, group, 0))
        estimates = (far_query @ of_queries) @ (jnp.repeat(far_key, group, 0) @ of_keys).swapaxes(1, 2)
        return float(jnp.var(logits - estimates, axis=2).mean() / jnp.var(logits, axis=2).mean())

    assert lost(400) < 0.9 * lost(24)
