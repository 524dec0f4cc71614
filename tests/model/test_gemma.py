"""Gemma's configs, and the names in checkpoints of a Gemma 3 that sees images."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from iceformer.model.gemma import GemmaConfig
from iceformer.model.gemma2 import Gemma2Config
from iceformer.model.gemma3 import Gemma3Config, Gemma3TextConfig
from iceformer.model.rope import Rope

from ..few import few
from .cases import CASES
from .reference import save_random, shared_fields
from .test_parity import convert, difference

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config_class", "name"),
    [(GemmaConfig, "GemmaConfig"), (Gemma2Config, "Gemma2Config"), (Gemma3TextConfig, "Gemma3TextConfig")],
)
def test_defaults_are_those_of_transformers(config_class: Any, name: str) -> None:
    import transformers

    config, reference = config_class.from_hf({}), getattr(transformers, name)()
    for field in shared_fields(config_class):
        assert getattr(config, field) == getattr(reference, field), field
    layer_types = getattr(reference, "layer_types", [FULL] * config.num_hidden_layers)
    assert config.windows == tuple(4096 if layer_type == SLIDING else None for layer_type in layer_types)
    thetas = {FULL: 1e6 if name == "Gemma3TextConfig" else 1e4, SLIDING: 1e4}
    assert config.ropes == tuple(Rope(rope_theta=thetas[layer_type]) for layer_type in layer_types)


def test_a_text_config_of_few_fields() -> None:
    """Published models with images give only what differs from the defaults."""
    text = {
        "hidden_size": 2560,
        "num_hidden_layers": 12,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = Gemma3Config.from_hf({"text_config": text, "image_token_index": 262144})
    assert config == Gemma3Config(**{**vars(Gemma3TextConfig.from_hf(text))})
    assert (config.num_attention_heads, config.head_dim, config.tie_word_embeddings) == (8, 256, True)
    assert config.windows == (1024, 1024, 1024, 1024, 1024, None) * 2
    assert config.ropes[5] == Rope("linear", 1e6, factor=8.0)
    assert config.ropes[0] == Rope("default", 1e4)
    assert not Gemma3Config.from_hf({"tie_word_embeddings": False, "text_config": text}).tie_word_embeddings


def test_caps_may_be_switched_off() -> None:
    config = Gemma2Config.from_hf({"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (GemmaConfig, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (GemmaConfig, {"hidden_activation": "silu"}, 'hidden_activation is "silu", supported: only "gelu_pytorch'),
        (Gemma2Config, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (Gemma2Config, {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0, expected a number above 0"),
        (Gemma2Config, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        (Gemma2Config, {"layer_types": [FULL]}, "layer_types is"),
        (Gemma2Config, {"sliding_window": None}, "sliding_window"),
        (Gemma2Config, {"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
        (Gemma3TextConfig, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (Gemma3Config, {"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention is true"),
        (Gemma3Config, {"text_config": "gemma"}, "text_config is 'gemma', expected an object"),
    ],
)
def test_refusals_name_the_field(config_class: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class.from_hf(fields)


def older(name: str) -> str:
    """The name that transformers before 4.52 gave the tensor, and 5 still writes."""
    for new, old in [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")]:
        name = name.replace(new, old) if name.startswith(new) else name
    return name.removeprefix("model.") if ".language_model" not in name else name


def newer(name: str) -> str:
    """The name that the tensor has in the module, and in checkpoints of transformers 4.52 and later versions."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.")) else name


@pytest.mark.parametrize(
    ("rename", "tied"), few(itertools.product((older, newer), (False, True)), [(older, True), (newer, False)])
)
def test_both_spellings_of_checkpoints_with_images(rename: Callable[[str], str], tied: bool, tmp_path: Path) -> None:
    config = {**CASES["gemma3"].tiny, "tie_word_embeddings": tied}
    reference = save_random(tmp_path / "source", "gemma3", **config)
    file = tmp_path / "source" / "model.safetensors"
    tensors = {rename(newer(name)): value for name, value in load_file(file).items()}
    prefix = "model.language_model." if rename is newer else "language_model.model."
    assert f"{prefix}layers.1.self_attn.q_norm.weight" in tensors
    assert any("vision_tower." in name for name in tensors)
    assert any("multi_modal_projector." in name for name in tensors)
    save_file(tensors, file)
    model = convert(tmp_path)
    assert difference(model, reference) < 1e-4
    assert (model.lm_head is None) == tied
    stored = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert stored["model_type"] == model.config.model_type == "gemma3"
