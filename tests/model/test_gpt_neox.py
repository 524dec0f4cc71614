"""GPT-NeoX's and StableLM's configs and the names in their checkpoints; the configs of OLMo 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from iceformer.model.gpt_neox import GPTNeoXConfig
from iceformer.model.olmo2 import Olmo2Config
from iceformer.model.rope import Rope
from iceformer.model.stablelm import StableLmConfig

from .cases import CASES
from .reference import save_random, shared_fields
from .test_parity import convert, difference


@pytest.mark.parametrize(
    ("config_class", "name", "share"),
    [
        (GPTNeoXConfig, "GPTNeoXConfig", 0.25),
        (StableLmConfig, "StableLmConfig", 0.25),
        (Olmo2Config, "Olmo2Config", 1.0),
    ],
)
def test_defaults_are_those_of_transformers(config_class: Any, name: str, share: float) -> None:
    import transformers

    config, reference = config_class.from_hf({}), getattr(transformers, name)()
    for field in shared_fields(config_class) - {"head_dim", "num_key_value_heads"}:
        assert getattr(config, field) == getattr(reference, field), field
    assert config.head_dim == reference.hidden_size // reference.num_attention_heads
    assert config.num_key_value_heads == reference.num_attention_heads
    assert config.ropes == (Rope(partial_rotary_factor=share),) * config.num_hidden_layers


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (GPTNeoXConfig, {"head_dim": 7}, "head_dim is 7, supported: only 96"),
        (GPTNeoXConfig, {"num_attention_heads": 5}, "hidden_size is 6144, expected a multiple"),
        (GPTNeoXConfig, {"rotary_pct": 1.5}, "partial_rotary_factor is 1.5"),
        (StableLmConfig, {"head_dim": 7}, "head_dim is 7, supported: only 80"),
        (StableLmConfig, {"hidden_size": 640}, "partial_rotary_factor is 0.25, which rotates 5 of 20 dimensions"),
        (StableLmConfig, {"num_key_value_heads": 5}, "multiple of num_key_value_heads, 5"),
        (StableLmConfig, {"qk_layernorm": 1}, "qk_layernorm is 1, expected true or false"),
        (Olmo2Config, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refusals_name_the_field(config_class: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class.from_hf(fields)


@pytest.mark.parametrize("bare", [False, True])
def test_checkpoints_with_stored_constants(bare: bool, tmp_path: Path) -> None:
    """Names as published: embed_out, with masks and frequencies in every layer; also those of a bare GPTNeoXModel."""
    reference = save_random(tmp_path / "source", "gpt_neox", **{**CASES["gpt_neox"].tiny, "tie_word_embeddings": bare})
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name.replace("lm_head.", "embed_out."): value for name, value in load_file(file).items()}
    assert ("embed_out.weight" in tensors) != bare
    if bare:
        tensors = {name.removeprefix("gpt_neox."): value for name, value in tensors.items()}
    for layer in range(2):
        prefix = f"layers.{layer}.attention." if bare else f"gpt_neox.layers.{layer}.attention."
        tensors[f"{prefix}bias"] = np.tril(np.ones((1, 1, 9, 9), np.float32))
        tensors[f"{prefix}masked_bias"] = np.array(-np.inf, np.float16)
        tensors[f"{prefix}rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, file)
    assert difference(convert(tmp_path), reference) < 1e-4


def test_a_norm_of_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    save_random(tmp_path / "source", "stablelm", **{**CASES["stablelm"].tiny, "qk_layernorm": True})
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_layernorm.norms.4.weight"] = tensors.pop(
        "model.layers.1.self_attn.q_layernorm.norms.2.weight"
    )
    save_file(tensors, file)
    with pytest.raises(ValueError, match="do not fit") as caught:
        convert(tmp_path)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "unexpected: model.layers.1.self_attn.q_layernorm.norms.4.weight [16], the config has no place for it",
        "missing: model.layers.1.self_attn.q_norm.scale[2] [16]",
    ]
