"""LoRA adapters, merged at convert, against PEFT's own merging; and what is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import iceformer
from iceformer.model.encoder import Encoder

from ..few import few
from ..model.forward import forward, load_decoder
from ..model.test_encoder_parity import encode
from .folders import edit_json, edit_tensors, read_json, refused, tiny, write_json

IDS = np.random.default_rng(0).integers(4, 100, (1, 23), dtype=np.int32)
ATTENTION = ["q_proj", "v_proj"]


def save_adapter(folder: Path, model: PreTrainedModel, config: Any) -> PeftModel:
    """A random adapter of the model in `folder`, and the model with it."""
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():  # What PEFT warns of is not under test.
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(str(folder))
    return adapted


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS).long()).logits.float().numpy()


def kernel_of(model: Any) -> np.ndarray:
    """The weight of the first layer's queries."""
    return np.asarray(model.model.layers[0].self_attn.q_proj.kernel[...])


DECODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": ATTENTION, "lora_alpha": 16}),
    "all layers": ("llama", {}, {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {}, {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 4}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 40, "up_proj": 2},
        },
    ),
    "one layer": ("llama", {}, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "output layer replaced": ("llama", {}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {}, {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "convolution-like layers": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused layers": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "biases": ("qwen2", {}, {"target_modules": ATTENTION, "bias": "lora_only"}),
}


@pytest.mark.parametrize(
    "case",
    few(
        DECODERS,
        ("plain", "patterns", "output layer replaced", "convolution-like layers", "fused layers", "biases"),
    ),
)
def test_logits_are_those_of_the_merged_model(case: str, tmp_path: Path) -> None:
    model_type, fields, options = DECODERS[case]
    model = tiny(tmp_path / "source", model_type, **fields)
    adapted = save_adapter(tmp_path / "adapter", model, LoraConfig(r=4, init_lora_weights=True, **options))
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint", adapter=tmp_path / "adapter")
    found = forward(load_decoder(tmp_path / "checkpoint"), IDS)
    expected = logits(adapted)
    assert np.abs(expected - logits(adapted.unload())).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_adapter_beside_the_weights_is_merged(tmp_path: Path) -> None:
    model = tiny(tmp_path / "source", "llama")
    adapted = save_adapter(tmp_path / "source", model, LoraConfig(r=4, target_modules=ATTENTION))
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    np.testing.assert_allclose(forward(load_decoder(tmp_path / "checkpoint"), IDS), logits(adapted), atol=1e-4)
    assert "adapter_model.safetensors" in read_json(tmp_path / "checkpoint" / "iceformer.json")["sha256"]


def test_names_meet_in_the_parameter_that_they_fill(tmp_path: Path) -> None:
    """The base was saved without its task head's prefix, the adapter was trained on the model with the head."""
    tiny(tmp_path / "source", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=3)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    adapted = save_adapter(tmp_path / "adapter", model, config)
    edit_json(tmp_path / "source" / "config.json", architectures=["BertForSequenceClassification"])
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint", adapter=tmp_path / "adapter")
    encoder = iceformer.load_model(tmp_path / "checkpoint")
    assert isinstance(encoder, Encoder)
    inputs = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS)}
    found = encode(encoder, inputs, np.array([IDS.shape[1]], np.int32))["logits"]
    np.testing.assert_allclose(found, logits(adapted.eval()), atol=1e-4)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    tiny(tmp_path / "source", "llama", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    adapted = save_adapter(tmp_path / "adapter", model, LoraConfig(r=4, target_modules=ATTENTION))
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint", adapter=tmp_path / "adapter")
    kernel = kernel_of(load_decoder(tmp_path / "checkpoint"))
    merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight.detach()
    np.testing.assert_array_equal(kernel.T, merged.to(torch.bfloat16).float().numpy())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter to spoil, of the model in the folder `source` beside it."""
    model = tiny(tmp_path / "source", "llama")
    save_adapter(tmp_path / "adapter", model, LoraConfig(r=4, target_modules=ATTENTION))
    return tmp_path / "adapter"


def change(**fields: object) -> Callable[[Path], None]:
    return lambda adapter: edit_json(adapter / "adapter_config.json", **fields)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(changes: dict[str, np.ndarray | None]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
        edit_tensors(adapter, changes)
        (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (change(use_dora=True), "use_dora is True"),
        (change(init_lora_weights="pissa_niter_16"), "init_lora_weights is 'pissa_niter_16'"),
        (change(peft_type="LOHA"), "peft_type is 'LOHA', supported: only 'LORA'"),
        (change(peft_type=None), "peft_type is None"),
        (change(alora_invocation_tokens=[3]), "alora_invocation_tokens is [3]"),
        (change(trainable_token_indices=[3]), "trainable_token_indices is [3]"),
        (change(layer_replication=[[0, 1]]), "layer_replication is [[0, 1]]"),
        (change(lora_alpha="16"), "lora_alpha is '16', expected a number"),
        (change(alpha_pattern={"(": 3}), "alpha_pattern has '(', not a regular expression"),
        (tensors({f"{Q_PROJ}.lora_A.weight": None}), "model.layers.0.self_attn.q_proj: has only lora_B"),
        (
            tensors({f"{Q_PROJ}.lora_A.weight": np.zeros((5, 48), np.float32)}),
            "model.layers.0.self_attn.q_proj: its factors are [5, 48] and [64, 4], expected [r, in] and [out, r]",
        ),
        (
            tensors({f"{Q_PROJ}.lora_A.weight": np.zeros((4, 44), np.float32)}),
            "model.layers.0.self_attn.q_proj: changes a weight of [64, 44], but the base's is [64, 48]",
        ),
        (
            tensors({f"{Q_PROJ}.lora_magnitude_vector": np.zeros(4, np.float32)}),
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector: is neither a tensor of the base model's",
        ),
        (
            tensors({f"{Q_PROJ}.lora_A.weight": np.zeros((4, 48), np.int8)}),
            f"{Q_PROJ}.lora_A.weight is I8",
        ),
    ],
)
def test_what_is_not_plain_is_refused(adapter: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(adapter)
    assert expected in refused(adapter.parent / "source", adapter=adapter)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny(tmp_path / "source", "llama")
    config = IA3Config(target_modules=ATTENTION, feedforward_modules=[])
    save_adapter(tmp_path / "adapter", model, config)
    assert "peft_type is 'IA3'" in refused(tmp_path / "source", adapter=tmp_path / "adapter")


def test_an_adapter_of_a_tied_layer_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    save_adapter(tmp_path / "adapter", model, LoraConfig(r=4, target_modules=["embed_tokens"]))
    message = refused(tmp_path / "source", adapter=tmp_path / "adapter")
    assert "model.embed_tokens: the base model's output layer shares this weight" in message


def test_an_adapter_alone_names_its_base(adapter: Path) -> None:
    change(base_model_name_or_path="organisation/base")(adapter)
    message = refused(adapter, FileNotFoundError)
    assert "is an adapter without its base model: convert the base model (organisation/base)" in message
    write_json(adapter / "config.json", read_json(adapter.parent / "source" / "config.json"))
    assert refused(adapter, FileNotFoundError) == message


def test_one_adapter_at_a_time(adapter: Path) -> None:
    source = adapter.parent / "source"
    for file in adapter.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    assert "has an adapter of its own" in refused(source, adapter=adapter)


def test_a_folder_that_is_no_adapter(adapter: Path) -> None:
    source = adapter.parent / "source"
    assert "lacks adapter_config.json" in refused(source, FileNotFoundError, adapter=source)
    (adapter / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(
        source, FileNotFoundError, adapter=adapter
    )
