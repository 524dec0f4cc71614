"""Weights in files and under names that are not the usual ones, and parts that the model does not use."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict
from transformers import AutoModel, AutoModelForSeq2SeqLM

import iceformer
from iceformer.convert.reader import open_weights
from iceformer.convert.rules import Plan, make_plan
from iceformer.convert.tables import rules_of
from iceformer.convert.weight_files import weight_source
from iceformer.model.encoder import Encoder
from iceformer.model.registry import abstract_module, build

from ..few import few
from ..model.cases import CASES, ENCODERS
from ..model.forward import forward, load_decoder
from .folders import (
    WEIGHTS,
    drop_fields,
    edit_json,
    edit_tensors,
    read_json,
    refused,
    rename_tensors,
    tensors_of,
    tiny,
    write_json,
    write_tensors,
)

IDS = np.arange(3, 33)[None]


def plan_of(folder: Path) -> Plan:
    """What converting does with the tensors of a folder."""
    weights = open_weights(folder)
    pooler = any("pooler" in name for name in weights.tensors)
    architecture, config = build(read_json(folder / "config.json") | {"add_pooling_layer": pooler})
    tree: Any = flatten_dict(nnx.to_pure_dict(nnx.state(abstract_module(architecture, config, jnp.float32))))
    shapes = {path: leaf.shape for path, leaf in tree.items()}
    return make_plan(rules_of(architecture.table, config), weights.tensors, shapes)


def converted(source: Path) -> Path:
    return iceformer.convert_checkpoint(source, source.parent / "checkpoint")


def hidden_of(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    model = iceformer.load_model(checkpoint)
    assert isinstance(model, Encoder)
    names = model.inputs(ids.shape[1])
    inputs = {name: jnp.asarray(ids if name == "input_ids" else np.zeros_like(ids)) for name in names}
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, inputs: dict[str, jax.Array]) -> jax.Array:
        return nnx.merge(graph, state).encode(inputs, jnp.asarray([ids.shape[1]]))["last_hidden_state"]

    return np.asarray(run(state, inputs))


def reference(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids))[0].numpy()


# Heads that are left over.


@pytest.mark.parametrize(
    "model_type",
    few(
        [name for name, cases in ENCODERS.items() if len(cases.tasks) > 1],
        ("bert", "distilbert", "modernbert", "vit"),
    ),
)
def test_heads_of_other_tasks_are_left_out(tmp_path: Path, model_type: str) -> None:
    source, tensors, classes = tmp_path / "source", {}, []
    for task in ENCODERS[model_type].tasks:
        model = tiny(source, model_type, auto_class=getattr(transformers, task), num_labels=2)
        prefix = f"{model.base_model_prefix}."
        tensors |= {name.removeprefix(prefix): value for name, value in tensors_of(source).items()}
        classes += read_json(source / "config.json")["architectures"]
    write_tensors(source, tensors)
    for name in classes:
        edit_json(source / "config.json", architectures=[name])
        plan = plan_of(source)
        assert plan.spare or len(classes) == 2, name
    drop_fields(source / "config.json", "architectures")
    assert {name.partition(".")[0] for name in plan_of(source).spare} >= {"classifier"}


def test_a_model_after_pre_training_converts_as_its_body_with_a_warning(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "bert", auto_class=transformers.AutoModelForPreTraining)
    drop_fields(source / "config.json", "architectures")
    with pytest.warns(UserWarning, match=r"left out: cls\.predictions, .*cls\.seq_relationship$"):
        checkpoint = converted(source)
    expected = reference(AutoModel.from_pretrained(source).eval(), IDS)
    np.testing.assert_allclose(hidden_of(checkpoint, IDS), expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "vit", "whisper"])
def test_known_parts_of_other_models_are_left_out(tmp_path: Path, model_type: str) -> None:
    source, extra = (
        tmp_path / "source",
        {"vit": "decoder.0.weight", "whisper": "projector.weight", "t5": "classifier.bias"},
    )
    (save_whisper if model_type == "whisper" else lambda folder: tiny(folder, model_type))(source)
    names = ["v_head.summary.weight", "v_head.summary.bias", *filter(None, [extra.get(model_type)])]
    edit_tensors(source, dict.fromkeys(names, np.zeros(3, np.float32)))
    assert plan_of(source).spare == sorted(names)


def save_whisper(folder: Path) -> None:
    sizes: dict[str, Any] = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "d_model": 8}
    config = transformers.WhisperConfig(
        **sizes,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        max_source_positions=8,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.WhisperModel(config).save_pretrained(folder)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "bert")
    edit_tensors(source, {"linear.weight": np.zeros((4, 48), np.float32)})
    assert "unexpected: linear.weight [4, 48]" in refused(source)


# The embeddings of T5, which may go by three names.


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
@pytest.mark.parametrize("names", [["encoder"], ["decoder"], ["encoder", "decoder"], ["shared", "decoder"]])
def test_the_table_of_t5_under_any_of_its_names(tmp_path: Path, model_type: str, names: list[str]) -> None:
    source = tmp_path / "source"
    tiny(source, model_type, auto_class=AutoModelForSeq2SeqLM)
    table = tensors_of(source)["shared.weight"]
    stored = {"shared": "shared.weight"} | {side: f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    edit_tensors(source, {name: table if side in names else None for side, name in stored.items()})
    plan = plan_of(source)
    filling = [name for name in stored.values() if name in plan.fills]
    assert len(filling) == 1
    assert {*filling, *plan.ties} == {stored[name] for name in names}


def test_the_encoders_table_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "t5", auto_class=AutoModelForSeq2SeqLM)
    edit_tensors(source, {"encoder.embed_tokens.weight": tensors_of(source)["shared.weight"], "shared.weight": None})
    expected = reference(transformers.T5EncoderModel.from_pretrained(source).eval(), IDS)
    np.testing.assert_allclose(hidden_of(converted(source), IDS), expected, atol=1e-4)


def test_two_tables_of_t5_that_differ_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "t5", auto_class=AutoModelForSeq2SeqLM)
    table = tensors_of(source)["shared.weight"]
    changes = {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": 2 * table, "shared.weight": None}
    edit_tensors(source, changes)
    assert "encoder.embed_tokens.weight differs from the tensor of embeddings.word_embeddings" in refused(source)


# Dtypes.


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_float64_is_narrowed(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    tiny(source, "llama", tie_word_embeddings=True)
    tensors = {name: value.astype(np.float64) for name, value in tensors_of(source).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(source, tensors)
    if form == "torch":
        (source / WEIGHTS).unlink()
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, source / "pytorch_model.bin")
    expected = reference(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), IDS)
    np.testing.assert_allclose(forward(load_decoder(converted(source)), IDS), expected, atol=1e-4)


def test_float64_beyond_float32_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    edit_tensors(source, {"model.norm.weight": np.full(48, 1e39), "lm_head.weight": np.full((288, 48), np.inf)})
    assert refused(source).endswith("NaN or infinite values in:\n  lm_head.weight")
    edit_tensors(source, {"lm_head.weight": np.zeros((288, 48))})
    assert refused(source).endswith("beyond the range of float32 in:\n  model.norm.weight")


# Names that wrappers leave.


@pytest.mark.parametrize(
    "model_type", few(CASES, ("bert", "gemma3", "gpt2", "llama", "modernbert", "qwen3_moe", "t5", "vit"))
)
def test_wrappers_leave_no_trace(tmp_path: Path, model_type: str) -> None:
    source = tmp_path / "source"
    tiny(source, model_type)
    plan, names = plan_of(source), list(tensors_of(source))
    rename_tensors(source, "_orig_mod.module.module.")
    assert plan_of(source) == plan
    assert sorted(info.stored for info in open_weights(source).tensors.values()) == sorted(
        "_orig_mod.module.module." + name for name in names
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_a_wrapped_model_in_shards_with_a_tie(tmp_path: Path, prefix: str) -> None:
    source = tmp_path / "source"
    tiny(source, "llama", tie_word_embeddings=True)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = sorted(tensors)
    (source / WEIGHTS).unlink()
    places: dict[str, str] = {}
    for part in (0, 1):
        shard = f"model-0000{part + 1}-of-00002.safetensors"
        # Only a part of the model was wrapped: torch.compile(model.model).
        held = {
            prefix + name if part else name.replace("model.", f"model.{prefix}", 1): tensors[name]
            for name in names[part::2]
        }
        write_tensors(source, held, shard)
        places |= dict.fromkeys(held, shard)
    write_json(source / f"{WEIGHTS}.index.json", {"weight_map": places})
    plan = plan_of(source)
    assert sorted([*plan.fills, *plan.ties]) == names
    if prefix == "module.":
        model = load_decoder(converted(source))
        np.testing.assert_array_equal(model.model.embed_tokens.embedding[...], tensors["lm_head.weight"])


def test_one_name_with_and_without_a_wrapper(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    edit_tensors(source, {"module.lm_head.weight": tensors_of(source)["lm_head.weight"]})
    assert "holds lm_head.weight twice: as lm_head.weight and as module.lm_head.weight" in refused(source)


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5", "vit"])
@pytest.mark.parametrize("prefix", ["net.encoder.", "student."])
def test_another_prefix_is_one_line(tmp_path: Path, model_type: str, prefix: str) -> None:
    source = tmp_path / "source"
    tiny(source, model_type)
    rename_tensors(source, prefix)
    edit_tensors(source, {"classifier.weight": np.zeros((3, 48), np.float32)})
    message = refused(source)
    assert "\n" not in message
    assert f"have the prefix {prefix!r}" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["tok_embeddings.weight", "layers.0.attention.wq.weight", "output.weight"],
            "the names of the model's authors",
        ),
        (["blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight"], r"begin with blk (2), token_embd (1)"),
    ],
)
def test_names_of_something_else_are_one_line(tmp_path: Path, names: list[str], said: str) -> None:
    source = tmp_path / "source"
    tiny(source, "mistral")
    write_tensors(source, dict.fromkeys(names, np.zeros((4, 4), np.float32)))
    message = refused(source)
    assert "\n" not in message
    assert said in message


# Files.


def rename_weights(source: Path, name: str) -> None:
    (source / WEIGHTS).rename(source / name)


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "model.bf16.safetensors",
        "consolidated.safetensors",
        "my model.safetensors",
        "model-00001-of-00001.safetensors",
    ],
)
def test_a_lone_file_of_another_name(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    rename_weights(source, name)
    assert [file.name for file in open_weights(source).files] == [name]
    assert plan_of(source).fills


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["model.fp16-00001-of-00002", "model-00001-of-00002.fp16"])
def test_shards_of_a_variant(tmp_path: Path, suffix: str, shard: str) -> None:
    source = tmp_path / "source"
    tiny(source, "llama")
    tensors, file = tensors_of(source), f"{shard}.{suffix}"
    rename_weights(source, file)
    if suffix == "bin":
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, source / file)
    write_json(source / f"model.{suffix}.index.fp16.json", {"weight_map": dict.fromkeys(tensors, file)})
    assert [file.name for file in open_weights(source).files] == [file]
    assert plan_of(source).fills


def test_the_usual_names_come_first_and_several_others_are_refused() -> None:
    others = {"config.json", "model.fp16.safetensors", "consolidated.safetensors", "training_args.bin"}
    assert weight_source({*others, WEIGHTS}) == WEIGHTS
    assert weight_source({*others, f"{WEIGHTS}.index.json"}) == f"{WEIGHTS}.index.json"
    with pytest.raises(
        FileNotFoundError, match=r"has consolidated\.safetensors, model\.fp16\.safetensors, expected one"
    ):
        weight_source(others)
    assert weight_source({"a.pt", "training_args.bin", "adapter_model.safetensors"}) == "a.pt"
    for shards in (["model-00001-of-00002.safetensors"], ["model.fp16-00002-of-00002.safetensors", "config.json"]):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json, .*download the index"):
            weight_source(shards)
