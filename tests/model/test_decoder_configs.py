"""Configs of decoders as transformers reads them: defaults, files as the hub has them, and what is refused."""

import copy
import dataclasses
from typing import Any

import pytest

from iceformer.model.decoder import DecoderConfig
from iceformer.model.registry import ARCHITECTURES, build

from .reference import shared_fields

# The fields that matter of published files, with some that do not.
HUB: dict[str, dict[str, Any]] = {
    "vicuna-7b-v1.5-16k": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "max_sequence_length": 16384,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Mistral-Nemo-Base-2407": {
        "architectures": ["MistralForCausalLM"],
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B-Instruct, with YaRN": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "granite-3.1-8b-base": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "embd_pdrop": 0.0,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "vocab_size": 32064,
    },
    "Phi-3-mini-128k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "full_attn_mod": 1,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [2.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
}

WIDEST_ROWS = {
    "vicuna-7b-v1.5-16k": 16384,
    "Mistral-7B-v0.1": 32768,
    "Qwen2.5-7B-Instruct, with YaRN": 131072,
    "Phi-3-mini-128k-instruct": 131072,
}

DECODERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "granite", "smollm3", "phi3")


def assert_read_as_transformers_does(fields: dict[str, Any]) -> None:
    """Every field that both configs have is equal, and so are the layers' windows and rope types."""
    from transformers import AutoConfig

    reference: Any = AutoConfig.for_model(**copy.deepcopy(fields))
    _, config = build(fields)
    assert isinstance(config, DecoderConfig)
    for name in shared_fields(config) - {"head_dim", "mlp_only_layers"}:
        assert getattr(config, name) == getattr(reference, name), name
    heads = reference.num_attention_heads
    assert config.head_dim == (getattr(reference, "head_dim", None) or reference.hidden_size // heads)
    layers = config.num_hidden_layers
    assert len(config.ropes) == len(config.windows) == layers
    window = reference.sliding_window if hasattr(reference, "sliding_window") else None
    if window is not None and window >= config.max_position_embeddings:
        window = None
    types = getattr(reference, "layer_types", None) or ["sliding_attention"] * layers
    assert config.windows == tuple(window if kind == "sliding_attention" else None for kind in types)
    flags = getattr(reference, "no_rope_layers", None) or [1] * layers
    for rope, rotates in zip(config.ropes, flags, strict=True):
        assert (rope is not None) == bool(rotates)
        if rope is not None:
            assert rope.rope_type == reference.rope_parameters["rope_type"]
            assert rope.rope_theta == reference.rope_parameters["rope_theta"]
            assert rope.partial_rotary_factor == reference.rope_parameters.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("model_type", DECODERS)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    assert_read_as_transformers_does({"model_type": model_type})


@pytest.mark.parametrize("model_type", DECODERS)
def test_null_fields_take_their_defaults(model_type: str) -> None:
    """But for a window and a number of key and value heads, of which null means something else."""
    architecture = ARCHITECTURES[model_type]
    fields = {each.name for each in dataclasses.fields(architecture.config)} - {"num_key_value_heads"}
    nulls = dict.fromkeys((*fields, "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window"))
    assert architecture.config.from_hf(nulls) == architecture.config.from_hf({})


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_are_read_as_transformers_does(name: str) -> None:
    assert_read_as_transformers_does(HUB[name])
    limit = WIDEST_ROWS.get(name, HUB[name]["max_position_embeddings"])
    assert build(HUB[name])[1].max_tokens == limit


def test_an_older_name_of_longrope() -> None:
    fields = HUB["Phi-3-mini-128k-instruct"]
    renamed = {**fields, "rope_scaling": {**fields["rope_scaling"], "type": "su"}}
    assert build(renamed) == build(fields)


def test_files_of_transformers_5_are_read() -> None:
    fields = {"model_type": "qwen3_moe", "num_local_experts": 60, "rope_parameters": {"rope_theta": 1e6}}
    config: Any = build(fields)[1]
    assert config.num_experts == 60
    assert config.ropes[0].rope_theta == 1e6


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a whole number"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window is '4096'"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1, expected a whole number of at least 0"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is .*for each of 32 layers"),
        ("qwen3", {"layer_types": ["linear_attention"] * 32}, "layer_types is .*expected 'full_attention'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 32}, "but sliding_window is null or switched off"),
        ("qwen3", {"layer_types": 5}, "layer_types is 5"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling is '8'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .* for each of 36 layers"),
        ("smollm3", {"no_rope_layers": [2] * 36}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', Phi-3 models have only"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor has 1"),
        ("phi3", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("qwen3_moe", {"num_experts": "8"}, "num_experts is '8'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": [1.0]}, "mlp_only_layers is"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ("qwen3_moe", {"norm_topk_prob": "true"}, "norm_topk_prob is 'true'"),
    ],
)
def test_refusals_name_the_field(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"model_type": model_type, **fields})
