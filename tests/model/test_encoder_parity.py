"""Every encoder with every task head, converted and loaded, against transformers."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import iceformer
from iceformer.attention import Attention
from iceformer.model.encoder import Encoder

from ..few import few
from .cases import ENCODERS
from .reference import save_random

Record = Callable[[str, object], None]
"""Puts a figure into the report of the test run (--junitxml)."""
LENGTHS = (57, 1, 36)
TOLERANCE = 1e-4
"""Of float32 outputs."""
USUAL = {
    "bert": ("AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "untied"),
    "dinov2": ("AutoModelForImageClassification", "gated"),
    "dinov2_with_registers": ("AutoModel",),
    "distilbert": ("AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
    "modernbert": ("AutoModelForMaskedLM", "mean"),
    "mt5": (),
    "nomic_bert": ("AutoModelForMaskedLM", "other"),
    "roberta": ("AutoModelForSequenceClassification", "other"),
    "t5": ("other",),
    "umt5": ("AutoModelForTextEncoding",),
    "vit": ("AutoModelForImageClassification",),
    "xlm-roberta": ("AutoModelForSequenceClassification",),
}
"""Tasks and options that are not slow: all, if a model type has no line. The code of the others runs with those of
another model type, or with another task of this one."""


def not_slow(cases: dict[str, Collection[str]]) -> list[Any]:
    """Parameters of a test for every model type and its options or tasks, without those that are slow."""
    return [
        pytest.param(model_type, case, marks=() if case in USUAL.get(model_type, names) else pytest.mark.slow)
        for model_type, names in cases.items()
        for case in names
    ]


def convert(folder: Path, dtype: str = "float32") -> Encoder:
    """The model of the Hugging Face folder `source` in a folder."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        iceformer.convert_checkpoint(folder / "source", checkpoint)
    model = iceformer.load_model(checkpoint, dtype)
    assert isinstance(model, Encoder)
    return model


def encode(
    model: Encoder,
    inputs: dict[str, np.ndarray],
    lengths: np.ndarray,
    attention: Attention = iceformer.Exact(),  # noqa: B008 - a frozen value
) -> dict[str, np.ndarray]:
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, inputs: dict[str, jax.Array], lengths: jax.Array) -> dict[str, jax.Array]:
        return nnx.merge(graph, state).encode(inputs, lengths, attention=attention)

    return {name: np.asarray(array) for name, array in run(state, inputs, lengths).items()}


def random_inputs(model: Encoder, rows: int, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    config: Any = model.config
    limits = {"input_ids": lambda: config.vocab_size, "token_type_ids": lambda: config.type_vocab_size}
    return {
        name: rng.integers(0, limits[name](), (rows, *info.shape), dtype=np.int32)
        if name in limits
        else rng.standard_normal((rows, *info.shape), np.float32)
        for name, info in model.inputs(tokens).items()
    }


def expected(reference: Any, inputs: dict[str, np.ndarray], row: int, length: int) -> dict[str, np.ndarray]:
    """The reference's outputs for one row by itself, without padding, named as ours."""
    import torch

    tokens = {"input_ids", "token_type_ids"}
    alone = {
        name: torch.from_numpy(array[row : row + 1, :length] if name in tokens else array[row : row + 1])
        for name, array in inputs.items()
    }
    with torch.no_grad():
        outputs = reference(
            **{name: array.long() if name in tokens else array for name, array in alone.items()},
            output_hidden_states=True,
        )
    named = {"logits": getattr(outputs, "logits", None), "pooled": getattr(outputs, "pooler_output", None)}
    if hasattr(outputs, "start_logits"):
        named["logits"] = torch.stack([outputs.start_logits, outputs.end_logits], -1)
    if hasattr(outputs, "last_hidden_state"):
        named["last_hidden_state"] = outputs.last_hidden_state
    return {name: array[0].float().numpy() for name, array in named.items() if array is not None}


def difference(model: Encoder, reference: Any) -> float:
    """Largest difference of any output over padded rows."""
    fixed = model.config.fixed_tokens
    lengths = LENGTHS if fixed is None else (fixed,) * 2
    inputs = random_inputs(model, len(lengths), max(lengths))
    outputs = encode(model, inputs, np.array(lengths, np.int32))
    assert all(np.isfinite(array).all() for array in outputs.values())
    worst = 0.0
    for row, length in enumerate(lengths):
        named = expected(reference, inputs, row, length)
        assert named
        for name, array in named.items():
            ours = outputs[name][row]
            ours = ours[: array.shape[0]] if array.ndim == 2 else ours
            worst = max(worst, float(np.abs(ours - array).max()))
    return worst


def save(folder: Path, model_type: str, task: str, **config: Any) -> Any:
    """Saves a random model with the head of a task and returns the reference."""
    import transformers

    fields = {**ENCODERS[model_type].tiny, **config}
    if task == "AutoModelForQuestionAnswering":
        fields["num_labels"] = 2
    return save_random(folder / "source", model_type, auto_class=getattr(transformers, task), **fields)


@pytest.mark.parametrize(("model_type", "task"), not_slow({name: cases.tasks for name, cases in ENCODERS.items()}))
def test_tasks_equal_transformers(model_type: str, task: str, tmp_path: Path, record_property: Record) -> None:
    reference = save(tmp_path, model_type, task)
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize(("model_type", "case"), not_slow({name: cases.options for name, cases in ENCODERS.items()}))
def test_options_equal_transformers(model_type: str, case: str, tmp_path: Path, record_property: Record) -> None:
    cases = ENCODERS[model_type]
    options = {"task": cases.tasks[-1], **cases.options[case]}
    reference = save(tmp_path, model_type, **options)
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("model_type", few(ENCODERS, ("bert",)))
def test_random_configs_equal_transformers(model_type: str, seed: int, tmp_path: Path, record_property: Record) -> None:
    cases = ENCODERS[model_type]
    reference = save(tmp_path, model_type, cases.tasks[seed % len(cases.tasks)], seed=seed, **cases.draw(seed))
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("model_type", few(ENCODERS, ("t5",)))
def test_two_stage_and_bfloat16(model_type: str, tmp_path: Path) -> None:
    """With a budget below the length, the model is near the exact one and no longer equal to it; so in bfloat16."""
    save(tmp_path, model_type, ENCODERS[model_type].tasks[0])
    model = convert(tmp_path)
    tokens = model.config.fixed_tokens or 200
    inputs, lengths = random_inputs(model, 1, tokens), np.array([tokens], np.int32)
    exact = encode(model, inputs, lengths)["last_hidden_state"]
    method = iceformer.TwoStage(method="mean_pool", budget=tokens // 2, query_block=8, exact_last_block=False)
    sparse = encode(model, inputs, lengths, method)["last_hidden_state"]
    everything = encode(model, inputs, lengths, replace(method, budget=tokens))["last_hidden_state"]
    rounded = encode(convert(tmp_path, "bfloat16"), inputs, lengths)["last_hidden_state"].astype(np.float32)
    assert np.abs(everything - exact).max() < TOLERANCE
    assert 1e-4 < np.abs(sparse - exact).mean() < exact.std() / 2
    assert 1e-4 < np.abs(rounded - exact).mean() < exact.std() / 20


@pytest.mark.parametrize("model_type", few(["bert", "roberta"], ["bert"]))
def test_a_checkpoint_without_a_pooler(model_type: str, tmp_path: Path) -> None:
    """The converted config says so, and the model gives hidden states only."""
    import transformers

    save(tmp_path, model_type, "AutoModel")
    reference = transformers.AutoModel.from_pretrained(tmp_path / "source", add_pooling_layer=False)
    reference.save_pretrained(tmp_path / "source")
    model = convert(tmp_path)
    assert model.pooler is None
    assert difference(model, reference) < TOLERANCE
