"""Nomic-BERT in the names of its authors, as nomic-embed-text has them, against transformers on the same tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import NomicBertConfig as ReferenceConfig
from transformers import NomicBertForMaskedLM, NomicBertModel

from iceformer.model.nomic_bert import NomicBertConfig

from .test_encoder_parity import TOLERANCE, convert, difference

AUTHORS: dict[str, Any] = {
    "model_type": "nomic_bert",
    "architectures": ["NomicBertModel"],
    "activation_function": "swiglu",
    "causal": False,
    "layer_norm_epsilon": 1e-3,
    "max_trained_positions": 40,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 48,
    "n_head": 4,
    "n_inner": 80,
    "n_layer": 2,
    "n_positions": 160,
    "pad_vocab_size_multiple": 16,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 500,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "scale_attn_weights": True,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 115,
}
REFERENCE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}


def random_tensors() -> dict[str, torch.Tensor]:
    """A model in the authors' names."""
    shapes = {
        "embeddings.word_embeddings.weight": (128, 48),
        "embeddings.token_type_embeddings.weight": (2, 48),
        "emb_ln.weight": (48,),
        "emb_ln.bias": (48,),
    }
    for layer in (f"encoder.layers.{index}" for index in range(2)):
        shapes |= {
            f"{layer}.attn.Wqkv.weight": (144, 48),
            f"{layer}.attn.out_proj.weight": (48, 48),
            f"{layer}.mlp.fc11.weight": (80, 48),
            f"{layer}.mlp.fc12.weight": (80, 48),
            f"{layer}.mlp.fc2.weight": (48, 80),
            **{f"{layer}.{norm}.{part}": (48,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        }
    torch.manual_seed(0)
    return {name: 0.2 * torch.randn(shape) + (len(shape) == 1) for name, shape in shapes.items()}


def save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_reference(folder: Path, tensors: dict[str, torch.Tensor], rope: dict[str, Any]) -> NomicBertModel:
    """What transformers makes of the authors' tensors."""
    config = ReferenceConfig(**REFERENCE, rope_parameters=rope, architectures=["NomicBertModel"]).to_dict()
    loaded: Any = NomicBertModel.from_pretrained(
        save(folder, config, tensors), attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(("scaling", "rope"), [(None, DEFAULT), (2.0, DYNAMIC)])
def test_hidden_states(scaling: float | None, rope: dict[str, Any], tmp_path: Path) -> None:
    tensors = random_tensors()
    reference = load_reference(tmp_path / "reference", tensors, rope)
    save(tmp_path / "source", {**AUTHORS, "rotary_scaling_factor": scaling}, tensors)
    model = convert(tmp_path)
    assert model.config.max_tokens == 160
    assert difference(model, reference) < TOLERANCE


def test_masked_language_model(tmp_path: Path) -> None:
    """The authors' head has no biases."""
    tensors = random_tensors()
    reference = NomicBertForMaskedLM(ReferenceConfig(**REFERENCE, rope_parameters=DEFAULT)).eval()
    reference.nomic_bert = load_reference(tmp_path / "reference", tensors, DEFAULT)
    reference.tie_weights()
    transform = reference.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.normal_(0, 0.2)
        transform.layer_norm.weight.normal_(1, 0.2)
        transform.layer_norm.bias.normal_(0, 0.2)
        transform.dense.bias.zero_()
        reference.cls.predictions.decoder.bias.zero_()
    head = {f"cls.predictions.transform.{name}": tensor for name, tensor in transform.state_dict().items()}
    head.pop("cls.predictions.transform.dense.bias")
    save(
        tmp_path / "source",
        {**AUTHORS, "architectures": ["NomicBertForPreTraining"]},
        {
            **{f"bert.{name}": tensor for name, tensor in tensors.items()},
            **head,
            "cls.predictions.decoder.weight": tensors["embeddings.word_embeddings.weight"].clone(),
        },
    )
    assert difference(convert(tmp_path), reference) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu_new"),
        ("head_dim", 16),
        ("num_experts", 8),
        ("prenorm", True),
        ("qkv_proj_bias", True),
        ("rotary_emb_fraction", 0.0),
        ("rotary_emb_interleaved", True),
        ("use_rms_norm", True),
    ],
)
def test_mathematics_that_is_not_there(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"config: {name} is"):
        NomicBertConfig.from_hf({**AUTHORS, name: value})
