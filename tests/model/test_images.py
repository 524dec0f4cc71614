"""Encoders of images: positions for other sizes, the two spellings of names, and what is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iceformer.model.images import bicubic
from iceformer.model.registry import build

from ..few import few
from .test_encoder_parity import TOLERANCE, convert, difference, encode, random_inputs, save

IMAGES = ["vit", "dinov2", "dinov2_with_registers"]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(37, 16), (5, 12), (3, 1), (1, 4), (6, 6)])
def test_bicubic_equals_torch(old: int, new: int, antialias: bool) -> None:
    expected = torch.nn.functional.interpolate(
        torch.eye(old)[None, None], size=(new, old), mode="bicubic", align_corners=False, antialias=antialias
    )[0, 0]
    np.testing.assert_allclose(bicubic(old, new, antialias=antialias), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "size"),
    few(
        itertools.product(IMAGES, (14, [43, 21])),
        [("vit", [43, 21]), ("dinov2_with_registers", [43, 21])],
    ),
)
def test_images_of_another_size(model_type: str, size: Any, tmp_path: Path) -> None:
    """`input_image_size` in the config: positions as transformers interpolates them for such images."""
    reference = save(tmp_path, model_type, "AutoModel", image_size=24, patch_size=3)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"input_image_size": size}))
    model = convert(tmp_path)
    fixed = model.config.fixed_tokens
    assert fixed is not None
    inputs = random_inputs(model, 2, fixed)
    assert inputs["pixel_values"].shape[2:] == tuple(np.broadcast_to(size, 2))
    outputs = encode(model, inputs, np.full(2, fixed, np.int32))
    options = {"interpolate_pos_encoding": True} if model_type == "vit" else {}
    with torch.no_grad():
        expected = reference(torch.from_numpy(inputs["pixel_values"]), **options)
    np.testing.assert_allclose(outputs["last_hidden_state"], expected.last_hidden_state.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(outputs["pooled"], expected.pooler_output.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("model_type", "config"),
    few(
        itertools.product(IMAGES, ({}, {"use_swiglu_ffn": True})),
        [("vit", {}), ("dinov2", {"use_swiglu_ffn": True})],
    ),
)
def test_names_of_the_modules(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints with the names that transformers' modules have since 5, which it translates to the older ones."""
    reference = save(tmp_path, model_type, "AutoModelForImageClassification", **config)
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    reference.save_pretrained(tmp_path / "source", save_original_format=False)
    assert (tmp_path / "source" / "model.safetensors").read_bytes() != before
    assert difference(convert(tmp_path), reference) < TOLERANCE


def test_vit_without_a_pooler(tmp_path: Path) -> None:
    """As the checkpoints of DINO are."""
    import transformers

    save(tmp_path, "vit", "AutoModel")
    reference = transformers.AutoModel.from_pretrained(tmp_path / "source", add_pooling_layer=False)
    reference.save_pretrained(tmp_path / "source")
    model = convert(tmp_path)
    assert model.pooler is None
    assert difference(model, reference) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["ViTForMaskedImageModeling"]}, "architectures names ViTForMaskedImageModeling"),
        ({"image_size": 8}, r"image_size is \[8, 8\], expected at least a patch"),
        ({"input_image_size": [224, 15]}, r"input_image_size is \[224, 15\], expected at least a patch"),
        ({"patch_size": [16, 16, 16]}, r"patch_size is \[16, 16, 16\], expected"),
        ({"patch_size": 0}, "patch_size is 0, expected"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"hidden_size": 100}, "expected a multiple of num_attention_heads"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"model_type": "vit", **config})
