"""ModernBERT's configuration: what the files of the hub say and transformers no longer writes."""

from typing import Any

import pytest
from transformers import ModernBertConfig as Reference

from iceformer.model.modernbert import ModernBertConfig

HUB: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "classifier_pooling": "mean",
    "global_attn_every_n_layers": 4,
    "global_rope_theta": 80000.0,
    "local_rope_theta": 500.0,
    "local_attention": 128,
    "num_hidden_layers": 9,
}


def test_the_spelling_of_the_hub_means_what_transformers_makes_of_it() -> None:
    config = ModernBertConfig.from_hf(HUB)
    assert config == ModernBertConfig.from_hf(Reference(**HUB).to_dict())
    assert config.windows == (None, 65, 65, 65, None, 65, 65, 65, None)
    assert [rope.rope_theta for rope in config.ropes[:2] if rope is not None] == [80000.0, 500.0]


@pytest.mark.parametrize("layer_types", ["full_attention", ["full_attention"], ["chunked_attention"] * 9])
def test_layer_types_that_do_not_fit(layer_types: object) -> None:
    with pytest.raises(ValueError, match="layer_types is"):
        ModernBertConfig.from_hf({**HUB, "layer_types": layer_types})
