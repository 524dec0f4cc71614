"""Every architecture, converted and loaded, against transformers: one test over chosen and random configs."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import iceformer
from iceformer.model.llama import LlamaForCausalLM
from iceformer.model.registry import ARCHITECTURES

from .forward import forward

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LLAMA_CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "derived_head_dim": {"head_dim": None, "hidden_size": 64},
    "large_head_dim": {"head_dim": 40, "rms_norm_eps": 1e-2},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 3.0, 3.5, 4.0],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 9.0, 10.0, 11.0],
            "original_max_position_embeddings": 40,
        },
        "max_position_embeddings": 64,
    },
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "tie_word_embeddings": True},
    "sharded": {"max_shard_size": "30KB"},
}


def random_llama(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    rope = draw.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 2.5},
            {"rope_type": "dynamic", "factor": 2.0},
            LLAMA3,
        ]
    )
    return {
        "seed": seed,
        "vocab_size": draw.randrange(40, 300),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice([6, 10, 16]),
        "head_dim": draw.choice([4, 8, 20, 32]),
        "intermediate_size": draw.randrange(20, 120),
        "num_hidden_layers": draw.randrange(1, 4),
        "max_position_embeddings": draw.choice([33, 50]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {**rope, "rope_theta": draw.choice([100.0, 10000.0, 1e6])},
        "dtype": draw.choice(["float32", "bfloat16", "float16"]),
        "max_shard_size": draw.choice(["20KB", "1GB"]),
    }


CASES = {"llama": {**LLAMA_CASES, **{f"random_{seed}": random_llama(seed) for seed in range(4)}}}
LENGTHS = (57, 1, 36)


def difference(model: LlamaForCausalLM, reference: Any, lengths: tuple[int, ...] = LENGTHS) -> float:
    """Largest difference of logits over padded rows, the reference taking every row by itself, without padding."""
    import torch

    ids = np.random.default_rng(0).integers(
        0, reference.config.vocab_size, (len(lengths), max(lengths)), dtype=np.int32
    )
    logits = forward(model, ids, np.array(lengths, np.int32))
    assert np.isfinite(logits).all()
    worst = 0.0
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids[row : row + 1, :length]).long()).logits[0].numpy()
        worst = max(worst, float(np.abs(logits[row, :length] - expected).max()))
    return worst


def test_cases_cover_every_architecture() -> None:
    assert CASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("model_type", "case"), [(model_type, case) for model_type, cases in CASES.items() for case in cases]
)
def test_logits_equal_transformers(model_type: str, case: str, tmp_path: Path, save_llama: Callable[..., Any]) -> None:
    reference = {"llama": save_llama}[model_type](tmp_path / "source", **CASES[model_type][case])
    model = iceformer.load_model(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    assert difference(model, reference) < 1e-4


@pytest.mark.parametrize("case", ["linear", "dynamic", "llama3"])
def test_older_spelling_of_rope(case: str, tmp_path: Path, save_llama: Callable[..., Any]) -> None:
    reference = save_llama(tmp_path / "source", **LLAMA_CASES[case])
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("type", None)
    if case != "llama3":
        rope["type"] = rope.pop("rope_type")
    file.write_text(json.dumps({**config, "rope_scaling": rope}))
    model = iceformer.load_model(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    assert difference(model, reference) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_torch_is(dtype: str, tmp_path: Path, save_llama: Callable[..., Any]) -> None:
    import torch

    reference = save_llama(tmp_path / "source", dtype=dtype, tie_word_embeddings=True)
    model = iceformer.load_model(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"), dtype)
    ids = np.random.default_rng(1).integers(0, reference.config.vocab_size, (1, 64), dtype=np.int32)
    logits = forward(model, ids, np.array([64], np.int32))
    with torch.no_grad():
        exact = reference(torch.from_numpy(ids).long()).logits.numpy()
        half = type(reference).from_pretrained(tmp_path / "source", dtype=getattr(torch, dtype))
        rounded = half(torch.from_numpy(ids).long()).logits.float().numpy()
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).mean() <= 1.5 * np.abs(rounded - exact).mean()
    assert np.abs(logits - exact).max() <= 2 * np.abs(rounded - exact).max()


def test_greedy_ids_of_real_weights(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "tinystories260k"
    model = iceformer.load_model(iceformer.convert_checkpoint(source, tmp_path / "checkpoint"))
    golden = json.loads((source / "golden.json").read_text())["greedy_ids"]
    graph, state = nnx.split(model)

    @jax.jit
    def next_id(state: nnx.State, ids: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graph, state)(ids, length[None])[0, length - 1])

    ids = np.zeros((1, 256), np.int32)
    ids[0, 0] = golden[0]
    for length in range(1, len(golden)):
        ids[0, length] = next_id(state, ids, np.int32(length))
    assert ids[0, : len(golden)].tolist() == golden
