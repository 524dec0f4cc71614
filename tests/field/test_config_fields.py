"""What configs carry: labels, class names, leftovers of other states of a model, fields under their other names."""

import copy
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

import iceformer
from iceformer.convert.quantization import without_quantization
from iceformer.convert.tensor_file import TensorInfo
from iceformer.model.encoder import read_labels, read_num_labels, unnamed_labels
from iceformer.model.modules import ACTIVATIONS
from iceformer.model.registry import ARCHITECTURES, build, find

from .folders import edit_json, edit_tensors, read_json, refused, tiny

# Labels.


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {"0": "a", "1": "b"}}, ["a", "b"]),
        ({"id2label": {"1": "b", "0": "a"}, "num_labels": 2}, ["a", "b"]),
        ({"id2label": {"1": "b", "0": "a"}, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": {"0": "a", "2": "c"}}, ["a", "LABEL_1"]),
        ({"id2label": {"1": "b", "2": "c"}}, ["LABEL_0", "b"]),
        ({"id2label": {0: "a", 1: 7}}, ["a", "7"]),
        ({"id2label": {"00": "a", "01": "b"}}, ["a", "b"]),
        ({"id2label": None, "label2id": {"a": 0, "b": 1, "c": 2}}, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_labels_are_those_of_transformers(fields: dict[str, Any], labels: list[str]) -> None:
    config: Any = transformers.BertConfig.from_dict(copy.deepcopy(fields))
    assert read_num_labels(fields) == config.num_labels == len(labels)
    assert list(read_labels(fields)) == labels
    assert config.id2label is not None
    assert {config.id2label.get(index, label) for index, label in enumerate(labels)} >= set(labels) - {"7"}


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": ["a", "b"]},
        {"id2label": "a"},
        {"id2label": {"a": 0, "b": 1}},
        {"id2label": {"0.0": "a"}},
        {"num_labels": "2"},
        {"num_labels": 2.0},
        {"num_labels": 0},
    ],
)
def test_labels_that_are_none_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"config: (?:id2label|num_labels) is "):
        build({"model_type": "bert", "architectures": ["BertForSequenceClassification"], **fields})


def test_gaps_between_labels_are_warned_of_and_compile(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "distilbert", auto_class=transformers.AutoModelForSequenceClassification, num_labels=2)
    edit_json(source / "config.json", id2label={"0": "no", "3": "yes"})
    assert unnamed_labels(read_json(source / "config.json")) == ["LABEL_1"]
    with pytest.warns(UserWarning, match="id2label does not name all of the 2 classes; the others are called LABEL_1$"):
        checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    artifact = iceformer.compile(checkpoint, tmp_path / "artifact", buckets=(32,))
    with iceformer.load(artifact) as session:
        assert session.info.model.labels == ("no", "LABEL_1")


def test_an_answer_has_a_start_and_an_end() -> None:
    fields = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "num_labels": 3}
    with pytest.raises(ValueError, match="num_labels is 3, expected 2"):
        build(fields)


# Class names.


def classes_of(model_type: str) -> set[str]:
    """The classes that transformers has for a model type."""
    mappings = [
        mapping for name, mapping in vars(modeling_auto).items() if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)
    ]
    named = [mapping[model_type] for mapping in mappings if model_type in mapping]
    return {name for names in named for name in (names if isinstance(names, tuple) else (names,))}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_config_without_model_type_is_known_by_its_class(model_type: str) -> None:
    classes = classes_of(model_type) if model_type != "lra" else {"LraModel", "LraForSequenceClassification"}
    # That of another model with Qwen2 in it, and one that transformers names for both Gemma 3s, but only the other has.
    classes -= {"JevForDecision", "Gemma3ForCausalLM" if model_type == "gemma3" else ""}
    assert len(classes) > 1
    for name in classes:
        assert find({"architectures": [name]}) is ARCHITECTURES[model_type], name
        assert find({"architectures": ["Unknown", name], "model_type": ""}) is ARCHITECTURES[model_type], name


@pytest.mark.parametrize("name", ["Gemma3nModel", "Qwen2VLModel", "BertGenerationEncoder", "Phi3VForCausalLM", "Llama"])
def test_classes_of_other_families_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="supported model types: "):
        find({"architectures": [name]})


def test_an_encoder_without_model_type_converts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "bert", auto_class=transformers.AutoModelForTokenClassification)
    edit_json(source / "config.json", model_type=None)
    model = iceformer.load_model(iceformer.convert_checkpoint(source, tmp_path / "checkpoint"))
    assert model.config.task == "token_classification"


# Quantisation that is over.

FLOATS = {"a.weight": TensorInfo(Path("f"), (2,), "BF16"), "a.position_ids": TensorInfo(Path("f"), (2,), "I64")}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"load_in_8bit": True}}, "quant_method bitsandbytes, 8 bits"),
        ({"quantization_config": {"_load_in_4bit": True, "quant_method": "bitsandbytes"}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "quant_method awq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 1]}}, "quant_method fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config has quant_method unnamed"),
        ({"compression_config": "int8"}, "quant_method int8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quant_method MLX, 4 bits"),
        ({"_load_in_4bit": True}, "_load_in_4bit has quant_method bitsandbytes, 4 bits"),
        ({"text_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    ],
)
def test_what_the_files_hold_decides(fields: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=rf"config: .*{said}, but all weights are floats"):
        kept = without_quantization({"model_type": "llama", **fields}, FLOATS)
    assert kept == {"model_type": "llama", **({"text_config": {}} if "text_config" in fields else {})}
    for name, dtype in {"a.weight": "I8", "b.scales": "F16", "b.weight_scale": "F32", "b.qweight": "I32"}.items():
        with pytest.raises(ValueError, match=rf"{said}, and quantised weights are not supported"):
            without_quantization(fields, {**FLOATS, name: TensorInfo(Path("f"), (2,), dtype)})


@pytest.mark.parametrize("fields", [{}, {"quantization_config": None}, {"quantization": {}, "load_in_4bit": False}])
def test_a_config_that_says_nothing_of_quantisation(fields: dict[str, Any]) -> None:
    assert without_quantization({"model_type": "llama", **fields}, FLOATS) == {"model_type": "llama"}


def test_weights_that_are_rounded_later_are_refused() -> None:
    with pytest.raises(ValueError, match="quant_method bitnet, and"):
        without_quantization({"quantization_config": {"quant_method": "bitnet"}}, FLOATS)


def test_a_merged_adapter_of_a_quantised_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(source / "config.json", quantization_config=quantization)
    with pytest.warns(UserWarning, match="all weights are floats"):
        checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert "quantization_config" not in read_json(checkpoint / "config.json")
    iceformer.load_model(checkpoint)
    edit_tensors(source, {"model.layers.0.mlp.up_proj.weight": np.zeros((1920, 1), np.uint8)})
    assert "quant_method bitsandbytes, 4 bits" in refused(source)


# Fields under other names, and those that only one side reads.


@pytest.mark.parametrize(
    ("model_type", "fields", "same"),
    [
        ("distilbert", {"hidden_size": 96, "dim": 48}, {"dim": 96}),
        ("distilbert", {"num_attention_heads": 2, "num_hidden_layers": 3}, {"n_heads": 2, "n_layers": 3}),
        ("gpt2", {"hidden_size": 96, "n_embd": 48, "n_positions": 7}, {"n_embd": 96, "n_positions": 7}),
        ("t5", {"hidden_size": 96, "head_dim": 8}, {"d_model": 96, "d_kv": 8}),
        ("t5", {"num_attention_heads": 3, "num_hidden_layers": 3}, {"num_heads": 3, "num_layers": 3}),
        ("umt5", {"num_hidden_layers": 3, "num_layers": None}, {"num_layers": 3}),
        ("whisper", {"hidden_size": 96, "num_hidden_layers": 3}, {"d_model": 96, "encoder_layers": 3}),
        ("whisper", {"num_attention_heads": 3}, {"encoder_attention_heads": 3}),
        ("mixtral", {"num_experts": 3, "num_local_experts": 4}, {"num_local_experts": 3}),
        ("qwen3_moe", {"num_experts": 9, "num_local_experts": 10}, {"num_experts": 10}),
        ("t5", {"feed_forward_proj": "gated-gelu", "is_gated_act": False}, {"feed_forward_proj": "gelu_new"}),
        ("t5", {"dense_act_fn": "silu", "is_gated_act": True}, {"feed_forward_proj": "gated-silu"}),
        ("modernbert", {"sliding_window": 7, "local_attention": 64}, {"local_attention": 14}),
        ("gpt2", {"hidden_size": None}, {}),
    ],
)
def test_fields_under_their_other_names(model_type: str, fields: dict[str, Any], same: dict[str, Any]) -> None:
    assert build({"model_type": model_type, **fields}) == build({"model_type": model_type, **same})
    assert build({"model_type": model_type, **fields}) != build({"model_type": model_type}) or not same


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"sliding_window": 4}),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt_neox", {"num_key_value_heads": 1}),
        ("gemma3_text", {"attn_logit_softcapping": 0.5}),
        ("gemma3", {"text_config": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5}}),
    ],
)
def test_what_transformers_does_not_apply_is_said(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    source = tmp_path / "source"
    tiny(source, model_type, **({"sliding_window": 64} if model_type == "mistral" else {}))
    edited = fields
    if model_type == "gemma3":
        edited = {"text_config": {**read_json(source / "config.json")["text_config"], **fields["text_config"]}}
    ids = np.arange(3, 33)[None]

    def logits() -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        with torch.no_grad():
            return model(torch.tensor(ids), use_cache=False).logits.numpy()

    before, plain = logits(), build(read_json(source / "config.json"))
    edit_json(source / "config.json", **edited)
    np.testing.assert_array_equal(logits(), before)
    checked: Any = build(read_json(source / "config.json"))
    assert checked == plain
    named = {field.partition(" is ")[0] for field in checked[1].ignored}
    assert named == set(fields.get("text_config", {name: 0 for name, value in fields.items() if value is not None}))


def test_an_ignored_field_is_warned_of(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    edit_json(source / "config.json", sliding_window=16)
    with pytest.warns(UserWarning, match="sliding_window is 16, which has no effect on llama, as in transformers"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bert", "is_causal": True}, "is_causal is true"),
        ({"model_type": "modernbert", "is_causal": True}, "is_causal is true"),
        ({"model_type": "llama", "per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is 8, expected at most 4"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_what_transformers_applies_and_we_do_not_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(fields)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    x = np.linspace(-6, 6, 97, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.asarray(ACTIVATIONS[name](jnp.asarray(x))), expected, atol=2e-6)
