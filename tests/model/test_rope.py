"""Rotary embedding against transformers' own frequencies and against float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.model.rope import Rope, apply_rotary, inverse_frequencies, rope_from_config, rotary_tables

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA31,
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_frequencies_of_real_sizes_equal_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(parameters))
    rope = rope_from_config({"rope_parameters": parameters}, 131072)
    frequencies = inverse_frequencies(rope, head_dim, jnp.array([5]))
    expected: Any = LlamaRotaryEmbedding(config).inv_freq
    np.testing.assert_allclose(frequencies[0], expected.numpy(), rtol=2e-7)


def test_dynamic_frequencies_follow_each_rows_length() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(parameters))
    lengths = [1, 4096, 4097, 30000]
    rope = rope_from_config({"rope_parameters": parameters}, 4096)
    frequencies = inverse_frequencies(rope, 64, jnp.array(lengths))
    for row, length in enumerate(lengths):
        expected = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=length)[0].numpy()
        np.testing.assert_allclose(frequencies[row], expected, rtol=2e-6)
    np.testing.assert_array_equal(frequencies[0], inverse_frequencies(Rope(), 64, jnp.array([1]))[0])


def test_tables_stay_exact_at_far_positions() -> None:
    positions = jnp.array([[0, 16383, 131071, 1048575]])
    tables = rotary_tables(Rope(), 64, positions, jnp.array([1048576]))
    frequencies = np.asarray(inverse_frequencies(Rope(), 64, jnp.array([1])))[0]
    angles = (np.asarray(positions[0], np.float32)[:, None] * frequencies).astype(np.float64)
    np.testing.assert_allclose(tables.cos[0], np.cos(angles), atol=2e-7)
    np.testing.assert_allclose(tables.sin[0], np.sin(angles), atol=2e-7)


def test_rotation_keeps_norms_and_depends_on_distance_only() -> None:
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 32)).astype(np.float32)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        tables = rotary_tables(Rope(), 32, jnp.array([[position]]), jnp.array([200]))
        return np.asarray(apply_rotary(jnp.asarray(x), tables))

    assert np.linalg.norm(rotated(query, 77)) == pytest.approx(np.linalg.norm(query), rel=1e-6)
    near, far = (float((rotated(query, p + 9) * rotated(key, p)).sum()) for p in (0, 150))
    assert near == pytest.approx(far, abs=1e-4)
    assert near != pytest.approx(float((query * key).sum()), abs=1e-2)


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 500}, Rope(rope_theta=500.0)),
        ({"rope_scaling": None, "rope_theta": 500.0}, Rope(rope_theta=500.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 9.0}, Rope(rope_theta=300.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", 10000.0, 2.0)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
            Rope("dynamic", 10000.0, 2.0, original_max_position_embeddings=64),
        ),
        ({"rope_parameters": LLAMA31}, Rope("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_both_spellings(config: dict[str, Any], rope: Rope) -> None:
    assert rope_from_config(config, 64) == rope


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn', supported are: default, dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": {**LLAMA31, "low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_refusals_name_the_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_from_config(config, 64)
