"""Whisper's encoder, from checkpoints with a decoder, against that of transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForSpeechSeq2Seq

import iceformer
from iceformer.model.encoder import Encoder
from iceformer.model.registry import build

from .reference import save_random
from .test_encoder_parity import TOLERANCE, convert, encode, random_inputs

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "num_mel_bins": 10,
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 60,
    "max_source_positions": 150,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def outputs_of(model: Encoder, reference: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The model's hidden states and the reference's."""
    fixed = model.config.fixed_tokens
    assert fixed is not None
    inputs = random_inputs(model, 2, fixed)
    ours = encode(model, inputs, np.full(2, fixed, np.int32), **options)
    assert ours.keys() == {"last_hidden_state"}
    with torch.no_grad():
        expected = reference(torch.from_numpy(inputs["input_features"])).last_hidden_state
    return ours["last_hidden_state"], expected.numpy()


@pytest.mark.parametrize(
    ("auto_class", "config"),
    [
        (AutoModelForSpeechSeq2Seq, {}),
        (
            AutoModel,
            {"activation_function": "relu", "max_source_positions": 31, "num_mel_bins": 16, "encoder_layers": 1},
        ),
    ],
    ids=["plain", "other"],
)
def test_encoder_equals_transformers(auto_class: Any, config: dict[str, Any], tmp_path: Path) -> None:
    reference = save_random(tmp_path / "source", "whisper", auto_class=auto_class, **{**TINY, **config})
    assert any("decoder." in name for name in load_file(tmp_path / "source" / "model.safetensors"))
    ours, expected = outputs_of(convert(tmp_path), reference.get_encoder())
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_encoder_by_itself(tmp_path: Path) -> None:
    reference = save_random(tmp_path / "whole", "whisper", auto_class=AutoModel, **TINY).get_encoder()
    reference.save_pretrained(tmp_path / "source")
    assert json.loads((tmp_path / "source" / "config.json").read_text())["architectures"] == ["WhisperEncoder"]
    ours, expected = outputs_of(convert(tmp_path), reference)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_two_stage_and_bfloat16(tmp_path: Path) -> None:
    """With a budget below the length, the model is near the exact one and no longer equal to it; so in bfloat16."""
    reference = save_random(tmp_path / "source", "whisper", auto_class=AutoModel, **TINY).get_encoder()
    model = convert(tmp_path)
    method = iceformer.TwoStage(method="mean_pool", budget=75, query_block=8, exact_last_block=False)
    sparse, exact = outputs_of(model, reference, attention=method)
    everything, _ = outputs_of(model, reference, attention=replace(method, budget=150))
    rounded, _ = outputs_of(convert(tmp_path, "bfloat16"), reference)
    assert np.abs(everything - exact).max() < TOLERANCE
    assert 1e-4 < np.abs(sparse - exact).mean() < exact.std() / 2
    assert rounded.dtype.name == "bfloat16"
    assert 1e-4 < np.abs(rounded.astype(np.float32) - exact).mean() < exact.std() / 20


def test_refuses_what_has_more_than_an_encoder() -> None:
    for name in ("WhisperForAudioClassification", "WhisperForCausalLM"):
        with pytest.raises(ValueError, match=f"architectures names {name}, supported: "):
            build({"model_type": "whisper", "architectures": [name]})
