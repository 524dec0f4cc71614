"""Every decoder as an encoder, converted and loaded: hidden states and heads of classifiers against transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import iceformer
from iceformer.model.decoder_encoder import base_class
from iceformer.model.registry import build

from .cases import DECODERS
from .reference import save_random
from .test_encoder_parity import TOLERANCE, Record, convert, difference, encode, random_inputs

HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
IN_EVERY_RUN = {
    ("gemma3_text", "AutoModel"),
    ("gpt2", "AutoModelForTokenClassification"),
    ("llama", "AutoModelForQuestionAnswering"),
}


def _heads(model_type: str) -> list[str]:
    """The auto classes of transformers that know a model type."""
    config = transformers.AutoConfig.for_model(model_type)
    mappings = {name: getattr(transformers, name)._model_mapping for name in HEADS}
    return [name for name, mapping in mappings.items() if type(config) in mapping]


def _with(model_type: str, **fields: Any) -> dict[str, Any]:
    """The fields at their place in the config of a type."""
    text = DECODERS[model_type].tiny.get("text_config")
    return fields if text is None else {"text_config": {**text, **fields}}


CASES = [(model_type, task) for model_type in DECODERS for task in ("AutoModel", *_heads(model_type))]


def save(folder: Path, model_type: str, task: str = "AutoModel", **fields: Any) -> Any:
    """Saves a random model with the head of a task and returns the reference."""
    auto_class = getattr(transformers, task)
    return save_random(folder / "source", model_type, auto_class=auto_class, **{**DECODERS[model_type].tiny, **fields})


@pytest.mark.parametrize(
    ("model_type", "task"),
    [case if case in IN_EVERY_RUN else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_outputs_equal_transformers(model_type: str, task: str, tmp_path: Path, record_property: Record) -> None:
    labels = {} if task in ("AutoModel", "AutoModelForQuestionAnswering") else {"num_labels": 3}
    reference = save(tmp_path, model_type, task, **labels)
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model_type", DECODERS)
def test_random_configs_equal_transformers(model_type: str, seed: int, tmp_path: Path, record_property: Record) -> None:
    tasks = ("AutoModel", *_heads(model_type))
    reference = save(tmp_path, model_type, tasks[seed % len(tasks)], seed=seed, **DECODERS[model_type].draw(seed))
    worst = difference(convert(tmp_path), reference)
    record_property("difference", worst)
    assert worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DECODERS)
def test_two_stage_and_bfloat16(model_type: str, tmp_path: Path) -> None:
    """With a budget below the length, the rows from there on are near the exact ones and no longer equal to them."""
    save(tmp_path, model_type)
    model = convert(tmp_path)
    inputs, lengths = random_inputs(model, 1, 200), np.array([200], np.int32)
    exact = encode(model, inputs, lengths)["last_hidden_state"]
    method = iceformer.TwoStage(method="mean_pool", budget=96, query_block=8, exact_last_block=False)
    sparse = encode(model, inputs, lengths, method)["last_hidden_state"]
    everything = encode(model, inputs, lengths, replace(method, budget=200))["last_hidden_state"]
    rounded = encode(convert(tmp_path, "bfloat16"), inputs, lengths)["last_hidden_state"].astype(np.float32)
    assert np.abs(everything - exact).max() < TOLERANCE
    assert np.abs(sparse[0, :96] - exact[0, :96]).max() < TOLERANCE
    assert 1e-4 < np.abs(sparse - exact).mean() < exact.std() / 2
    assert 1e-4 < np.abs(rounded - exact).mean() < exact.std() / 10


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 9}),
        ("mistral", {"is_causal": False, "sliding_window": 9}),
        *(
            pytest.param(name, _with(name, is_causal=False, **more), marks=pytest.mark.slow)
            for name in DECODERS
            for more in ({}, {"sliding_window": 9, "use_sliding_window": True})
            if name != "llama" or not more
        ),
    ],
)
def test_tokens_that_see_those_behind_them(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    reference = save(tmp_path, model_type, **fields)
    model = convert(tmp_path)
    assert not model.config.causal
    assert difference(model, reference) < TOLERANCE


@pytest.mark.parametrize("pad_token_id", [7, *(pytest.param(id_, marks=pytest.mark.slow) for id_ in (None, -1))])
def test_a_row_that_ends_in_the_id_of_padding(pad_token_id: int | None, tmp_path: Path) -> None:
    """transformers reads the logits before it, and those of the first token where there is nothing else."""
    reference = save(tmp_path, "llama", HEADS[0], pad_token_id=pad_token_id)
    rows = [[5, 7, 6, 7, 7], [5, 7, 6], [7, 7], [9]]
    ids = np.full((len(rows), 5), 7, np.int32)
    for row, given in enumerate(rows):
        ids[row, : len(given)] = given
    logits = encode(convert(tmp_path), {"input_ids": ids}, np.array([len(row) for row in rows], np.int32))["logits"]
    with torch.no_grad():
        expected = np.stack([reference(torch.tensor([row])).logits[0].numpy() for row in rows])
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind", "task"),
    [
        ("LlamaModel", "encoder", "features"),
        ("LlamaForCausalLM", "decoder", "text_generation"),
        ("GPT2LMHeadModel", "decoder", "text_generation"),
        ("Gemma3ForConditionalGeneration", "decoder", "text_generation"),
        ("Qwen3ForSequenceClassification", "encoder", "sequence_classification"),
        ("Qwen3ForTokenClassification", "encoder", "token_classification"),
        ("Qwen3ForQuestionAnswering", "encoder", "question_answering"),
    ],
)
def test_the_class_says_what_a_model_is_for(name: str, kind: str, task: str) -> None:
    config = build({"model_type": "llama", "architectures": [name]})[1]
    assert (config.kind, config.task) == (kind, task)


def test_base_classes() -> None:
    names = ("GPT2LMHeadModel", "Gemma3ForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3Model")
    assert [base_class(name) for name in names] == ["GPT2Model", "Gemma3Model", "Qwen3Model", "Qwen3Model"]
    assert build({"architectures": ["Qwen3Model"]})[1].model_type == "qwen3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2DoubleHeadsModel"]},
            "architectures names GPT2DoubleHeadsModel, supported: classes",
        ),
        ({"architectures": ["Qwen2ForRewardModel"]}, "architectures names Qwen2ForRewardModel"),
        ({"architectures": ["LlamaForMultipleChoice"]}, "architectures names LlamaForMultipleChoice"),
        ({"architectures": "LlamaModel"}, "architectures names 'LlamaModel'"),
        ({"architectures": [5]}, r"architectures names \[5\]"),
        ({"is_causal": False}, "is_causal is false, or use_bidirectional_attention is true, so that the model cannot"),
        ({"is_causal": None}, "is_causal is None, expected true or false"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "so that the model cannot write text"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": "0"},
            "pad_token_id is '0', expected a token id or null",
        ),
        (
            {"architectures": ["LlamaForTokenClassification"], "token_classification_bias": False},
            "token_classification_bias is false",
        ),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"model_type": "llama", **fields})
