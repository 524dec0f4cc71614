"""GPT-2's config, the names in its checkpoints, and its table of positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import iceformer
from iceformer.model.gpt2 import GPT2Config

from .cases.gpt2 import TINY
from .forward import forward, load_decoder
from .reference import save_random, shared_fields
from .test_parity import convert, difference


def test_defaults_are_those_of_transformers() -> None:
    from transformers import GPT2Config as Reference

    config, reference = GPT2Config.from_hf({"n_inner": None, "task_specific_params": {}, "n_ctx": 1024}), Reference()
    names = shared_fields(GPT2Config) - {"head_dim", "num_key_value_heads", "intermediate_size"}
    for name in names:
        assert getattr(config, name) == getattr(reference, name), name
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (64, 12, 3072)
    assert config.max_tokens == 1024


def test_common_names_are_read_too() -> None:
    config = GPT2Config.from_hf({"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2})
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (64, 3, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"n_head": 7}, "n_embd is 768, expected a multiple of n_head, 7"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"activation_function": "mish"}, "activation_function is 'mish', supported: gelu"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_hf(fields)


def test_checkpoints_of_the_bare_model_with_stored_masks(tmp_path: Path) -> None:
    """The names of the first published files: no "transformer.", masks in every layer, no config fields of later."""
    reference = save_random(tmp_path / "source", "gpt2", **TINY)
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, file)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    for later in ("scale_attn_weights", "tie_word_embeddings", "add_cross_attention", "n_inner"):
        config.pop(later, None)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert difference(convert(tmp_path), reference) < 1e-4


def test_padding_beyond_the_table_of_positions(tmp_path: Path) -> None:
    save_random(tmp_path / "source", "gpt2", **{**TINY, "n_positions": 16})
    model = load_decoder(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    ids = np.random.default_rng(0).integers(0, 200, (2, 40), dtype=np.int32)
    lengths = np.array([16, 5], np.int32)
    padded, exact = forward(model, ids, lengths), forward(model, ids[:, :16], lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(padded[row, :length], exact[row, :length], atol=1e-5)
    assert np.isfinite(padded).all()
    assert np.isnan(forward(model, ids)[:, 16]).all()
