"""What a config may ask for whatever the architecture."""

from typing import Any

import pytest

from iceformer.model.registry import build


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quant_method gptq, 4 bits,"),
        ({"quant_method": "awq", "w_bit": 4}, "quant_method awq, 4 bits,"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits,"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits,"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method fp8,"),
        ({"quant_method": "mxfp4"}, "quant_method mxfp4,"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "quant_method compressed-tensors,"),
        ({"format": "pack-quantized"}, "quant_method unnamed,"),
        ("int8", "quant_method int8,"),
    ],
)
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_quantised_weights_are_refused_with_their_method(name: str, field: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"config: {name} has {'' if found.startswith('quant') else '.*'}{found}"):
        build({"model_type": "llama", name: field})


def test_no_quantisation_is_what_null_says() -> None:
    assert build({"model_type": "llama", "quantization_config": None}) == build({"model_type": "llama"})


def test_code_of_an_unknown_architecture_is_named_as_not_run() -> None:
    with pytest.raises(ValueError, match=r"auto_map names code .* never run\), supported model types are: .*llama"):
        build({"model_type": "mine", "auto_map": {"AutoModel": "modeling.Model"}})
    build({"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}})
