"""T5's encoder: its buckets of distances, and checkpoints that have a decoder too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import iceformer
from iceformer.model.registry import build
from iceformer.model.t5 import distance_buckets

from .test_encoder_parity import TOLERANCE, convert, difference, save


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (12, 20), (32, 9), (5, 70), (4, 2), (64, 1000)])
def test_buckets_equal_transformers(buckets: int, reach: int) -> None:
    distance = np.arange(-2 * reach, 2 * reach + 1)
    expected = T5Attention._relative_position_bucket(torch.from_numpy(distance), True, buckets, reach)
    ours = distance_buckets(np.clip(distance, -reach, reach), buckets, reach)
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("task", ["AutoModel", "AutoModelForSeq2SeqLM"])
def test_a_checkpoint_with_a_decoder(task: str, tmp_path: Path) -> None:
    """With the copies of the embedding that older checkpoints have."""
    reference = save(tmp_path, "t5", task)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("decoder.") for name in tensors)
    embedding = tensors["shared.weight"]
    tensors |= {f"{part}.embed_tokens.weight": embedding.clone() for part in ("encoder", "decoder")}
    save_file(tensors, path)
    assert difference(convert(tmp_path), reference.get_encoder()) < TOLERANCE
    tensors["encoder.embed_tokens.weight"] = embedding + 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight"):
        iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["T5ForSequenceClassification"]}, "architectures names T5ForSequenceClassification"),
        ({"feed_forward_proj": "gated-swish2"}, "feed_forward_proj is 'gated-swish2', supported: "),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3, expected at least 4"),
        ({"relative_attention_max_distance": 8}, "less than 4 [*] relative_attention_max_distance, 8"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"model_type": "t5", **config})
