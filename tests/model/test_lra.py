"""The Transformer of Long Range Arena in its published sizes, against a torch module."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import iceformer
from iceformer.model.lra import LraConfig

from ..few import few
from .test_encoder_parity import convert, encode

JAX = {
    "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "position_embedding_type": "sinusoidal",
}
"""What the benchmark's own models have in common."""


def sizes(hidden: int, qkv: int, mlp: int, layers: int, heads: int, **config: Any) -> dict[str, Any]:
    """Sizes in the order of the published tables."""
    return {
        "hidden_size": hidden,
        "qkv_size": qkv,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **config,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "listops": sizes(512, 512, 2048, 6, 8, **JAX, classifier_pooling="cls", num_labels=10),
    "text": sizes(256, 256, 1024, 4, 4, **JAX, classifier_pooling="cls"),
    "retrieval": sizes(128, 128, 512, 4, 4, **JAX, architectures=["LraModel"]),
    "image": sizes(
        32, 32, 64, 1, 1, **{**JAX, "position_embedding_type": "learned"}, classifier_pooling="cls", num_labels=10
    ),
    "pathfinder32": sizes(128, 64, 128, 1, 4, **JAX, classifier_pooling="mean"),
    "pytorch": sizes(64, 64, 128, 2, 2, classifier_pooling="padded_mean", num_labels=10),
    "pytorch_tied": sizes(64, 64, 128, 3, 2, classifier_pooling="mean", tied_weights=True),
}
COMMON = {"model_type": "lra", "vocab_size": 60, "max_position_embeddings": 256}


class Attention(nn.Module):
    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        for name in ("W_q", "W_k", "W_v"):
            setattr(self, name, nn.Linear(config.hidden_size, config.qkv_size, bias=config.attention_bias))
        self.ff = nn.Linear(config.qkv_size, config.hidden_size, bias=config.attention_bias)
        self.heads = config.num_attention_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("W_q", "W_k", "W_v")
        )
        return self.ff(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm1 = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.mha = Attention(config)
        self.norm2 = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.mlpblock = nn.Sequential(
            nn.Linear(hidden, config.intermediate_size),
            nn.GELU(approximate="tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none"),
            nn.Dropout(0.1),
            nn.Linear(config.intermediate_size, hidden),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mha(self.norm1(x))
        return x + self.mlpblock(self.norm2(x))


class Body(nn.Module):
    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)})
        if config.position_embedding_type == "learned":
            self.embeddings["position_embeddings"] = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.tied_weights:
            self.transformer = Layer(config)
        else:
            for index in range(config.num_hidden_layers):
                setattr(self, f"transformer_{index}", Layer(config))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def positions(self, tokens: int) -> torch.Tensor:
        if self.config.position_embedding_type == "learned":
            return self.embeddings["position_embeddings"](torch.arange(tokens))
        table = torch.zeros(tokens, self.config.hidden_size)
        for position in range(tokens):
            for pair in range(self.config.hidden_size // 2):
                angle = position / 10000 ** (2 * pair / self.config.hidden_size)
                table[position, 2 * pair], table[position, 2 * pair + 1] = math.sin(angle), math.cos(angle)
        return table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings["word_embeddings"](ids) + self.positions(ids.shape[1])
        for index in range(self.config.num_hidden_layers):
            x = getattr(self, "transformer" if self.config.tied_weights else f"transformer_{index}")(x)
        return self.norm(x)


class Reference(nn.Module):
    """Named as the published PyTorch code; takes one row without padding."""

    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        if config.task == "sequence_classification":
            self.seq_classifer = nn.ModuleDict(
                {
                    "mlpblock": nn.Sequential(
                        nn.Linear(config.hidden_size, config.intermediate_size),
                        nn.ReLU(),
                        nn.Linear(config.intermediate_size, config.num_labels),
                    )
                }
            )

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.model(ids)
        if self.config.task == "features":
            return {"last_hidden_state": hidden[0]}
        pooled = {
            "cls": hidden[:, 0],
            "mean": hidden.mean(1),
            "padded_mean": hidden.sum(1) / self.config.max_position_embeddings,
        }[self.config.classifier_pooling]
        return {"last_hidden_state": hidden[0], "logits": self.seq_classifer["mlpblock"](pooled)[0]}


def save(folder: Path, preset: str, **changes: Any) -> Reference:
    fields = {**COMMON, **PRESETS[preset], **changes}
    torch.manual_seed(0)
    reference = Reference(LraConfig.from_hf(fields)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(reference.state_dict(), folder / "model.safetensors")
    return reference


@pytest.mark.parametrize("preset", few(PRESETS, ("retrieval", "image", "pathfinder32", "pytorch", "pytorch_tied")))
def test_published_sizes_equal_torch(preset: str, tmp_path: Path) -> None:
    reference = save(tmp_path / "source", preset)
    lengths = np.array([57, 1, 36], np.int32)
    ids = np.random.default_rng(0).integers(0, 60, (3, 57), np.int32)
    outputs = encode(convert(tmp_path), {"input_ids": ids}, lengths)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids[row : row + 1, :length]).long())
        assert ("logits" in outputs) == ("logits" in expected)
        for name, array in expected.items():
            ours = outputs[name][row] if name == "logits" else outputs[name][row, :length]
            np.testing.assert_allclose(ours, array.numpy(), atol=1e-4)


@pytest.mark.slow
def test_two_stage_and_bfloat16(tmp_path: Path) -> None:
    save(tmp_path / "source", "pytorch")
    ids = np.random.default_rng(0).integers(0, 60, (1, 200), np.int32)
    inputs, lengths = {"input_ids": ids}, np.array([200], np.int32)
    model = convert(tmp_path)
    exact = encode(model, inputs, lengths)["last_hidden_state"]
    method = iceformer.TwoStage(method="mean_pool", budget=100, query_block=8, exact_last_block=False)
    sparse = encode(model, inputs, lengths, method)["last_hidden_state"]
    rounded = encode(convert(tmp_path, "bfloat16"), inputs, lengths)["last_hidden_state"].astype(np.float32)
    assert 1e-4 < np.abs(sparse - exact).mean() < exact.std() / 2
    assert 1e-4 < np.abs(rounded - exact).mean() < exact.std() / 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"qkv_size": 65}, "qkv_size is 65, expected a multiple of num_attention_heads, 2"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ({"architectures": ["LraForMatching"]}, "architectures names LraForMatching"),
        ({"architectures": ["LraForTokenClassification"]}, "supported: only LraForSequenceClassification"),
        (
            {"hidden_size": 65, "qkv_size": 65, "num_attention_heads": 5, "position_embedding_type": "sinusoidal"},
            "even number",
        ),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LraConfig.from_hf({**COMMON, **PRESETS["pytorch"], **changes})
