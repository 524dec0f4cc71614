"""Rotary embedding against transformers' own frequencies and against float64."""

import copy
import importlib
import random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.model.rope import (
    Rope,
    apply_rotary,
    inverse_frequencies,
    rope_from_config,
    ropes_from_config,
    rotary_tables,
)

from ..few import few

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE_LISTS = {
    "short_factor": [1.0, 1.05, 1.2, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 3.0, 9.0, 20.0, 40.0],
}
LONGROPE = {"rope_type": "longrope", **LONGROPE_LISTS}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA31,
        {**YARN, "rope_theta": 1000000.0},
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


def frequencies_and_scale(config: dict[str, Any], length: int, head_dim: int) -> tuple[np.ndarray, float]:
    """What transformers computes for a Llama with this config in a row of `length` tokens."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference: Any = LlamaConfig(head_dim=head_dim, **copy.deepcopy(config))
    frequencies, scale = ROPE_INIT_FUNCTIONS[reference.rope_parameters["rope_type"]](reference, None, seq_len=length)
    return frequencies.numpy(), float(scale)


YARN_OPTIONS: dict[str, list[Any]] = {
    "rope_theta": [3.0, 10000.0, 5e6],
    "factor": [0.5, 1.0, 2.5, 40.0, None],
    "original_max_position_embeddings": [4, 100, 4096, None],
    "attention_factor": [None, 0.7, 2.0],
    "beta_fast": [None, 0, 1.5, 32, 64.0],
    "beta_slow": [None, 0, 0.5, 1.5],
    "mscale": [None, 0, 0.707, 1.0],
    "mscale_all_dim": [None, 0, 0.5, 1],
    "truncate": [None, True, False],
    "partial_rotary_factor": [None, 0.3, 0.5, 1.0],
}


@pytest.mark.parametrize("seed", few(range(60), range(12)))
def test_random_yarn_equals_transformers(seed: int) -> None:
    draw = random.Random(seed)
    parameters = {name: draw.choice(values) for name, values in YARN_OPTIONS.items()}
    # A null of these is not what an absent field is to transformers; the others may be either.
    kept = {"rope_type": "yarn", "factor": parameters.pop("factor")}
    truncate = {"truncate": True} if parameters["truncate"] is None and draw.random() < 0.5 else {}
    kept |= {name: value for name, value in parameters.items() if value is not None} | truncate
    config = {"rope_parameters": kept, "max_position_embeddings": draw.choice([512, 32768])}
    rope = rope_from_config(config, config["max_position_embeddings"], default_partial_rotary_factor=1.0)
    head_dim = draw.choice([8, 40, 128])
    expected, scale = frequencies_and_scale(config, 1, head_dim)
    rope.check(head_dim)
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim, jnp.array([9]))[0], expected, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-7)


@pytest.mark.parametrize("outside", [None, 30, 3000])
@pytest.mark.parametrize("inside", [None, 60])
@pytest.mark.parametrize("parameters", [{}, {"factor": 8.0}, {"factor": 0.5}, {"attention_factor": 1.25}])
def test_longrope_equals_transformers(parameters: dict[str, Any], inside: int | None, outside: int | None) -> None:
    original = {} if inside is None else {"original_max_position_embeddings": inside}
    config: dict[str, Any] = {"rope_scaling": {**LONGROPE, **original, **parameters}, "rope_theta": 500.0}
    if outside is not None:
        config["original_max_position_embeddings"] = outside
    switch = outside or inside or 2048
    rope = rope_from_config(config, 2048)
    lengths = [1, switch, switch + 1]
    frequencies = inverse_frequencies(rope, 12, jnp.array(lengths))
    for row, length in enumerate(lengths):
        expected, scale = frequencies_and_scale({**config, "max_position_embeddings": 2048}, length, 12)
        np.testing.assert_allclose(frequencies[row], expected, rtol=3e-7)
        assert rope.attention_factor == pytest.approx(scale, rel=1e-7)
    assert not np.allclose(frequencies[1], frequencies[2])


PHI3: dict[str, Any] = {"default_partial_rotary_factor": 1.0, "older_types": {"su": "longrope", "yarn": "longrope"}}
GPT_NEOX: dict[str, Any] = {
    "default_partial_rotary_factor": 0.25,
    "theta_field": "rotary_emb_base",
    "partial_rotary_field": "rotary_pct",
}
STABLELM: dict[str, Any] = {"default_partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    ("architecture", "arguments", "config"),
    [
        pytest.param("Phi3", PHI3, {}, marks=pytest.mark.slow),
        pytest.param("Phi3", PHI3, {"partial_rotary_factor": 0.75, "rope_theta": 300.0}, marks=pytest.mark.slow),
        ("Phi3", PHI3, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        pytest.param(
            "Phi3", PHI3, {"rope_scaling": LONGROPE, "original_max_position_embeddings": 20}, marks=pytest.mark.slow
        ),
        ("Phi3", PHI3, {"rope_parameters": {**LONGROPE, "type": "longrope", "factor": 3.0}}),
        (
            "Phi3",
            PHI3,
            {
                "rope_scaling": {"type": "su", **LONGROPE_LISTS, "original_max_position_embeddings": 90},
                "original_max_position_embeddings": 20,
            },
        ),
        pytest.param("GPTNeoX", GPT_NEOX, {}, marks=pytest.mark.slow),
        pytest.param(
            "GPTNeoX", GPT_NEOX, {"rotary_pct": 1.0, "rotary_emb_base": 700, "rope_theta": 5.0}, marks=pytest.mark.slow
        ),
        pytest.param(
            "GPTNeoX",
            GPT_NEOX,
            {"rotary_pct": 0.6, "rope_scaling": {"type": "linear", "factor": 3.0}},
            marks=pytest.mark.slow,
        ),
        ("GPTNeoX", GPT_NEOX, {"rotary_pct": 0.7, "rope_scaling": {"type": "dynamic", "factor": 3.0}}),
        ("GPTNeoX", GPT_NEOX, {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.9, **YARN}}),
        pytest.param("StableLm", STABLELM, {}, marks=pytest.mark.slow),
        ("StableLm", STABLELM, {"partial_rotary_factor": 0.5, "rope_theta": 300}),
        pytest.param("Mixtral", {"default_theta": 1e6}, {}, marks=pytest.mark.slow),
        ("SmolLM3", {"default_theta": 2e6}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("NomicBert", {"default_theta": 1000.0}, {"rope_parameters": {"rope_type": "default"}}),
        ("Qwen2", {}, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}}),
    ],
)
def test_tables_equal_the_architectures_own(
    architecture: str, arguments: dict[str, Any], config: dict[str, Any]
) -> None:
    import torch
    import transformers
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    head_dim = 12
    sizes = {"num_attention_heads": 2, "hidden_size": 2 * head_dim, "max_position_embeddings": 90}
    reference: Any = getattr(transformers, f"{architecture}Config")(**sizes, **copy.deepcopy(config))
    module = importlib.import_module(f"transformers.models.{reference.model_type}.modeling_{reference.model_type}")
    embedding = getattr(module, f"{architecture}RotaryEmbedding")(reference)
    original = {"original_max_position_embeddings": 4096} if architecture == "Phi3" else {}
    rope = rope_from_config({**original, **config}, 90, **arguments)
    rope.check(head_dim)
    queries = np.random.default_rng(0).normal(size=(1, 2, 130, head_dim)).astype(np.float32)
    for length in (15, 130):
        positions = np.arange(length)[None]
        tables = rotary_tables(rope, head_dim, jnp.asarray(positions, jnp.int32), jnp.array([length]))
        x = torch.from_numpy(queries[:, :, :length])
        cos, sin = embedding(x, torch.from_numpy(positions))
        np.testing.assert_allclose(tables.cos, cos[..., : cos.shape[-1] // 2], atol=2e-5)
        np.testing.assert_allclose(tables.sin, sin[..., : sin.shape[-1] // 2], atol=2e-5)
        expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
        np.testing.assert_allclose(apply_rotary(jnp.asarray(x.numpy()), tables), expected, atol=1e-4)


GEMMA3: dict[str, Any] = {
    "theta_fields": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "default_thetas": {"full_attention": 1e6, "sliding_attention": 1e4},
    "scaled": ("full_attention",),
}
MODERNBERT: dict[str, Any] = {
    "theta_fields": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "default_thetas": {"full_attention": 160000.0, "sliding_attention": 1e4},
    "scaled": ("full_attention", "sliding_attention"),
}


@pytest.mark.parametrize("architecture", ["Gemma3", "ModernBert"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 900.0, "rope_local_base_freq": 77, "global_rope_theta": 800, "local_rope_theta": 88.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 900.0},
        {"rope_parameters": {"full_attention": {"type": "linear", "factor": 2.0}}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}, "rope_theta": 6.0, "global_rope_theta": 7.0},
        {
            "rope_parameters": {
                "full_attention": {
                    name: LLAMA31[name] for name in LLAMA31 if name != "original_max_position_embeddings"
                },
                "sliding_attention": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 50.0},
            },
            "original_max_position_embeddings": 7,
        },
        {
            "rope_parameters": {"full_attention": {"rope_theta": 60.0}, "sliding_attention": {"rope_theta": 50.0}},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ],
)
def test_parameters_per_layer_type_equal_transformers(architecture: str, config: dict[str, Any]) -> None:
    from transformers import Gemma3TextConfig, ModernBertConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    config_class, embedding_class, arguments = {
        "Gemma3": (Gemma3TextConfig, Gemma3RotaryEmbedding, GEMMA3),
        "ModernBert": (ModernBertConfig, ModernBertRotaryEmbedding, MODERNBERT),
    }[architecture]
    reference: Any = config_class(max_position_embeddings=700, num_hidden_layers=6, **copy.deepcopy(config))
    embedding = embedding_class(reference)
    head_dim = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    ropes = ropes_from_config(config, 700, reference.layer_types, **arguments)
    assert ropes.keys() == {"full_attention", "sliding_attention"}
    for layer_type, rope in ropes.items():
        rope.check(head_dim)
        expected = getattr(embedding, f"{layer_type}_inv_freq").numpy()
        np.testing.assert_allclose(inverse_frequencies(rope, head_dim, jnp.array([5]))[0], expected, rtol=1e-6)
        assert rope.attention_factor == pytest.approx(getattr(embedding, f"{layer_type}_attention_scaling"))


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
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", 10000.0, factor=2.0)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
            Rope("dynamic", 10000.0, factor=2.0, original_max_position_embeddings=64),
        ),
        ({"rope_parameters": LLAMA31}, Rope(**LLAMA31)),
    ],
)
def test_both_spellings(config: dict[str, Any], rope: Rope) -> None:
    assert rope_from_config(config, 64) == rope


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "axial"}}, "rope_type is 'axial', supported: default, dynamic"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type is .'yarn'., supported"),
        ({"rope_scaling": {"type": "su", **LONGROPE_LISTS}}, "rope_type is 'su'"),
        ({"rope_parameters": {**YARN, "beta_fast": 2, "beta_slow": 3}}, "beta_fast is 2.0 and beta_slow is 3.0"),
        ({"rope_parameters": {**YARN, "attention_factor": -1.0}}, "attention_factor is -1.0"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate is 1"),
        ({"rope_parameters": {**YARN, "mscale": "1"}}, "mscale is '1'"),
        ({"rope_parameters": {**YARN, "rope_theta": 1}}, "rope_theta is 1"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None, expected a list"),
        ({"rope_parameters": {**LONGROPE, "long_factor": 2.0}}, "long_factor is 2.0, expected a list"),
        (
            {"rope_parameters": {**LONGROPE, "short_factor": [1.0, 0, 2.0]}},
            r"short_factor\[1\] is 0, expected a number",
        ),
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings is 1"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": {**LLAMA31, "low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, supported: only 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, supported: only 1.0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_refusals_name_the_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_from_config(config, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters has rope_type outside of a layer type"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters has full_attention outside of a layer type"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling has no rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq is -1"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, "truncate is false"),
    ],
)
def test_refusals_per_layer_type_name_the_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ropes_from_config(config, 64, ["sliding_attention", "full_attention"], **GEMMA3)


@pytest.mark.parametrize(
    ("rope", "head_dim", "message"),
    [
        (Rope(), 7, "head_dim is 7, of which 7 dimensions rotate"),
        (Rope("dynamic", factor=2.0, original_max_position_embeddings=8), 2, "above 2 if rope is dynamic"),
        (Rope(partial_rotary_factor=0.1), 8, "of which 0 dimensions rotate"),
        (Rope("longrope", short_factor=(1.0,), long_factor=(1.0, 1.0)), 4, "short_factor has 1 numbers, expected 2"),
        (Rope("longrope", short_factor=(1.0,), long_factor=(1.0, 1.0)), 2, "long_factor has 2 numbers, expected 1"),
    ],
)
def test_heads_that_cannot_be_rotated_are_refused(rope: Rope, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope.check(head_dim)


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 1\.5, expected at most 1"):
        rope_from_config({"partial_rotary_factor": 1.5}, 64, default_partial_rotary_factor=1.0)


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        (Rope(), 4096),
        (Rope("linear", factor=4.0), 16384),
        (Rope("yarn", factor=4.0, original_max_position_embeddings=4096), 16384),
        (Rope("yarn", factor=4.0, original_max_position_embeddings=1000), 4096),
        (Rope("llama3", factor=8.0, original_max_position_embeddings=512), 4096),
        (Rope("longrope", original_max_position_embeddings=512), 4096),
        (Rope("dynamic", factor=2.0), None),
    ],
)
def test_tokens_that_a_row_may_have(rope: Rope, tokens: int | None) -> None:
    assert rope.max_tokens(4096) == tokens
