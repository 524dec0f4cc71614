"""Every decoder, converted and loaded, against transformers: one test over chosen and random configs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import iceformer
from iceformer.model.decoder import CausalLM
from iceformer.model.registry import ARCHITECTURES

from ..few import few
from .cases import CASES, DECODERS
from .forward import forward, load_decoder
from .reference import save_random

Record = Callable[[str, object], None]
"""Puts a figure into the report of the test run (--junitxml)."""
LENGTHS = (57, 1, 36)
TOLERANCE = 1e-4
"""Of float32 logits."""
USUAL = {
    "gemma": ("legacy_activation",),
    "gemma2": ("low_caps",),
    "gemma3": ("older_fields",),
    "gemma3_text": ("ropes_by_type",),
    "gpt2": ("scaled_by_layer",),
    "gpt_neox": ("no_biases", "sequential"),
    "granite": ("all_multipliers",),
    "llama": ("multi_query", "sharded"),
    "mistral": ("window_of_itself",),
    "mixtral": ("stacked",),
    "olmo2": ("head_dim",),
    "phi3": ("partial_longrope",),
    "qwen2": ("upper_windows",),
    "qwen3": ("types",),
    "qwen3_moe": ("every_second",),
    "smollm3": ("every_fourth",),
    "stablelm": ("norms_of_heads",),
}
"""Options that are not slow: all, if a model type has no line. The code of the others runs with those of another model
type, or in tests of that part."""


def difference(model: CausalLM, reference: Any, lengths: tuple[int, ...] = LENGTHS) -> float:
    """Largest difference of logits over padded rows, the reference taking every row by itself, without padding."""
    import torch

    ids = np.random.default_rng(0).integers(
        0, reference.config.get_text_config().vocab_size, (len(lengths), max(lengths)), dtype=np.int32
    )
    logits = forward(model, ids, np.array(lengths, np.int32))
    assert np.isfinite(logits).all()
    worst = 0.0
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids[row : row + 1, :length]).long()).logits[0].numpy()
        worst = max(worst, float(np.abs(logits[row, :length] - expected).max()))
    return worst


def convert(folder: Path) -> CausalLM:
    """The model of the Hugging Face folder `source` in a folder."""
    return load_decoder(iceformer.convert_checkpoint(folder / "source", folder / "checkpoint"))


def test_cases_cover_every_architecture() -> None:
    # transformers has no auto class for the encoder of Whisper and no Long Range Arena: test_whisper.py, test_lra.py.
    assert CASES.keys() | {"whisper", "lra"} == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("model_type", "case"),
    [
        pytest.param(model_type, case, marks=() if case in USUAL.get(model_type, cases.options) else pytest.mark.slow)
        for model_type, cases in DECODERS.items()
        for case in cases.options
    ],
)
def test_logits_equal_transformers(model_type: str, case: str, tmp_path: Path, record_property: Record) -> None:
    cases = CASES[model_type]
    reference = save_random(tmp_path / "source", model_type, **{**cases.tiny, **cases.options[case]})
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("model_type", few(DECODERS, ("llama",)))
def test_random_configs_equal_transformers(model_type: str, seed: int, tmp_path: Path, record_property: Record) -> None:
    cases = CASES[model_type]
    reference = save_random(tmp_path / "source", model_type, seed=seed, **{**cases.tiny, **cases.draw(seed)})
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DECODERS)
def test_two_stage_attention_of_every_layer(model_type: str, tmp_path: Path) -> None:
    """With a budget below the length, the model is near the exact one and no longer equal to it."""
    cases = CASES[model_type]
    save_random(tmp_path / "source", model_type, **cases.tiny)
    model = convert(tmp_path)
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (1, 200), dtype=np.int32)
    exact = forward(model, ids)
    method = iceformer.TwoStage(method="mean_pool", budget=96, query_block=8, exact_last_block=False)
    sparse = forward(model, ids, attention=method)
    everything = forward(model, ids, attention=replace(method, budget=200))
    assert np.abs(everything - exact).max() < TOLERANCE
    assert np.abs(sparse[0, :96] - exact[0, :96]).max() < TOLERANCE
    assert 1e-4 < np.abs(sparse - exact).mean() < exact.std()


@pytest.mark.parametrize("case", few(["linear", "dynamic", "llama3"], ["dynamic"]))
def test_older_spelling_of_rope(case: str, tmp_path: Path) -> None:
    cases = CASES["llama"]
    reference = save_random(tmp_path / "source", "llama", **{**cases.tiny, **cases.options[case]})
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("type", None)
    if case != "llama3":
        rope["type"] = rope.pop("rope_type")
    file.write_text(json.dumps({**config, "rope_scaling": rope}))
    assert difference(convert(tmp_path), reference) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", few(DECODERS, ("gemma3_text",)))
def test_half_precision_is_as_near_as_torch_is(model_type: str, dtype: str, tmp_path: Path) -> None:
    import torch

    reference = save_random(tmp_path / "source", model_type, dtype=dtype, **CASES[model_type].tiny)
    model = load_decoder(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"), dtype)
    ids = np.random.default_rng(1).integers(0, reference.config.get_text_config().vocab_size, (1, 64), dtype=np.int32)
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
    model = load_decoder(iceformer.convert_checkpoint(source, tmp_path / "checkpoint"))
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
