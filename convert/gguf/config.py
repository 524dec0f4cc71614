"""A Hugging Face config from the metadata of a GGUF file. Every key about the model is read, or refused by name."""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...host.messages import listed, shown
from ...model.registry import ARCHITECTURES
from ...model.windows import FULL, SLIDING
from .header import Header
from .names import CONFIG_TENSORS, FREQUENCIES, LONG_FACTORS, SHORT_FACTORS, Piece
from .reader import read_piece

Config = dict[str, Any]
_MOST = 2**31
# What keys mean that an architecture does not read: nothing, if they have these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# About training or about the file, not the model.
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "context_length", "vocab_size"}


@dataclass
class Fields:
    """The metadata of a file's architecture, by their names without it, and which of them were read."""

    header: Header
    architecture: str
    left: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        prefix = f"{self.architecture}."
        self.left = {key.removeprefix(prefix) for key in self.header.metadata if key.startswith(prefix)}

    def get(self, name: str) -> Any:
        """A value of any kind; None if there is none."""
        self.left.discard(name)
        return self.header.metadata.get(f"{self.architecture}.{name}")

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, or a list with one for each layer that are all the same; ValueError for something else."""
        value = self.get(name)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value < _MOST:
            raise self.wrong(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number of at least 0; ValueError for something else."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.wrong(name, value, "a number of at least 0")
        return _shortest(value)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return name in self.header.tensors

    def wrong(self, name: str, value: Any, expected: str) -> ValueError:
        """The error about a value."""
        found = "missing" if value is None else f"{json.dumps(value)[:200]}"
        return ValueError(f"{self.header.path}: {self.architecture}.{name} is {found}, expected {expected}")

    def check_all_read(self) -> None:
        """ValueError with the keys that were not read, but for those without a meaning."""
        refused = []
        for name in sorted(self.left - _HARMLESS):
            value = self.get(name)
            if not any(value == neutral for neutral in _NEUTRAL.get(name, ())):
                refused.append(f"{self.architecture}.{name} is {json.dumps(value)[:200]}")
        if refused:
            raise ValueError(
                f"{self.header.path} asks for what is not supported for architecture {self.architecture}:"
                f"{listed(refused)}"
            )


def read_config(header: Header) -> Config:
    """The config of a file's model, as a Hugging Face folder would have it.

    Raises:
        ValueError: no language model, an architecture that is not supported, or a key that is missing, out of range
            or not supported.
    """
    architecture = _architecture(header)
    fields = Fields(header, architecture)
    config = _BUILDERS[architecture](fields, _sizes(fields))
    fields.check_all_read()
    return {"architectures": [ARCHITECTURES[config["model_type"]].module.__name__], **config}


def _architecture(header: Header) -> str:
    path, metadata = header.path, header.metadata
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind == "adapter":
        raise ValueError(f"{path} is a LoRA adapter without its base model: merge it into that with llama.cpp first")
    if kind == "mmproj" or architecture == "clip":
        raise ValueError(f"{path} is a projector for images or sound (mmproj): give the language model's file")
    if kind != "model":
        raise ValueError(f"{path} has general.type {shown(repr(kind))}, expected a model")
    if not isinstance(architecture, str) or architecture not in _BUILDERS:
        found, supported = shown(repr(architecture)), ", ".join(sorted(_BUILDERS))
        raise ValueError(f"{path} has general.architecture {found}, supported: {supported}")
    if not header.tensors:
        raise ValueError(f"{path} has no tensors: it contains only a vocabulary")
    return architecture


def _sizes(fields: Fields) -> Config:
    """What all architectures have."""
    header = fields.header
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path} has no token_embd.weight, [tokens, embedding_length]")
    vocab_size = fields.size("vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        raise fields.wrong("vocab_size", vocab_size, f"{embedding.shape[0]}, the rows of token_embd.weight")
    layers = fields.size("block_count")
    numbers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(numbers) != layers:
        raise fields.wrong("block_count", layers, f"{len(numbers)}, the blocks that the file holds")
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", hidden // heads)
    if (value_dim := fields.size("attention.value_length", head_dim)) != head_dim:
        raise fields.wrong("attention.value_length", value_dim, f"{head_dim}, as for keys")
    experts = fields.size("expert_feed_forward_length", 0) if "expert_feed_forward_length" in fields.left else 0
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": fields.size("feed_forward_length", experts or None),
        **({"moe_intermediate_size": experts} if experts else {}),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.size("context_length"),
        "tie_word_embeddings": not fields.has("output.weight"),
        **_token_ids(header, vocab_size),
    }


def _token_ids(header: Header, vocab_size: int) -> Config:
    """Ids of the tokens that begin and end a text, and of padding; warns of those that no token has."""
    ids: Config = {}
    for name, spelling in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        key = f"tokenizer.ggml.{spelling}_token_id"
        value = header.metadata.get(key)
        if type(value) is int and 0 <= value < vocab_size:
            ids[f"{name}_token_id"] = value
        elif value is not None:
            warnings.warn(
                f"{header.path}: {key} is {value!r}, which is not the id of a token; it is left out", stacklevel=2
            )
    return ids


def _llama(fields: Fields, sizes: Config) -> Config:
    config = sizes | _rms(fields) | _rope(fields, sizes) | _biases(fields)
    if experts := fields.size("expert_count", 0, least=0):
        used = fields.size("expert_used_count")
        config = _without(config, "attention_bias", "mlp_bias", "moe_intermediate_size")
        config |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": used}
        config["intermediate_size"] = sizes.get("moe_intermediate_size", sizes["intermediate_size"])
        return config | {"sliding_window": fields.size("attention.sliding_window", 0, least=0) or None}
    if window := fields.size("attention.sliding_window", 0, least=0):
        return _without(config, "attention_bias", "mlp_bias") | {"model_type": "mistral", "sliding_window": window}
    if fields.has("blk.0.attn_q.bias") and not fields.has("blk.0.attn_output.bias"):
        # A Llama has biases on all four or on none; this is the same mathematics.
        return _without(config, "attention_bias", "mlp_bias") | {"model_type": "qwen2"}
    return config | {"model_type": "llama"}


def _qwen2(fields: Fields, sizes: Config) -> Config:
    return sizes | _rms(fields) | _rope(fields, sizes) | {"model_type": "qwen2"}


def _qwen3(fields: Fields, sizes: Config) -> Config:
    bias = fields.has("blk.0.attn_q.bias")
    return sizes | _rms(fields) | _rope(fields, sizes) | {"model_type": "qwen3", "attention_bias": bias}


def _qwen3_moe(fields: Fields, sizes: Config) -> Config:
    # llama.cpp computes the weights of a token's experts so that they add up to 1 always.
    used = fields.size("expert_used_count")
    return _qwen3(fields, sizes) | {
        "model_type": "qwen3_moe",
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": used,
        "norm_topk_prob": True,
        "moe_intermediate_size": sizes.get("moe_intermediate_size", sizes["intermediate_size"] // used),
    }


def _gemma(fields: Fields, sizes: Config) -> Config:
    return (
        sizes
        | _rms(fields)
        | _rope(fields, sizes)
        | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    )


def _gemma2(fields: Fields, sizes: Config) -> Config:
    return (
        sizes
        | _rms(fields)
        | _rope(fields, sizes)
        | {
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _query_scalar(fields, sizes, largest=46),
            "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0) or None,
            "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0) or None,
            **_windows(fields, sizes, period=2, default=4096),
        }
    )


def _gemma3(fields: Fields, sizes: Config) -> Config:
    return (
        sizes
        | _rms(fields)
        | _rope(fields, sizes)
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _query_scalar(fields, sizes, largest=62),
            "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0) or None,
            **_windows(fields, sizes, period=6, default=None),
        }
    )


def _phi3(fields: Fields, sizes: Config) -> Config:
    rope = _rope(fields, sizes, partial="partial_rotary_factor")
    scaling = rope["rope_scaling"] or {}
    original = scaling.get("original_max_position_embeddings", sizes["max_position_embeddings"])
    return (
        sizes
        | _rms(fields)
        | rope
        | {
            "model_type": "phi3",
            "original_max_position_embeddings": original,
            "sliding_window": fields.size("attention.sliding_window", 0, least=0) or None,
        }
    )


def _gpt2(fields: Fields, sizes: Config) -> Config:
    return {
        "model_type": "gpt2",
        "vocab_size": sizes["vocab_size"],
        "n_embd": sizes["hidden_size"],
        "n_head": sizes["num_attention_heads"],
        "n_inner": sizes["intermediate_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_positions": sizes["max_position_embeddings"],
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        **_token_ids(fields.header, sizes["vocab_size"]),
    }


def _gpt_neox(fields: Fields, sizes: Config) -> Config:
    rope = _rope(fields, sizes, partial="rotary_pct")
    rope["rotary_emb_base"] = rope.pop("rope_theta")
    parallel = fields.get("use_parallel_residual")
    return _without(sizes, "head_dim", "num_key_value_heads") | {
        "model_type": "gpt_neox",
        **rope,
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": True if parallel is None else parallel,
        "attention_bias": fields.has("blk.0.attn_qkv.bias"),
    }


def _stablelm(fields: Fields, sizes: Config) -> Config:
    # As in llama.cpp the tensors say which layers these are: the key says true of models that never had the field.
    fields.get("use_parallel_residual")
    return _without(sizes, "head_dim") | {
        "model_type": "stablelm",
        **_rope(fields, sizes, partial="partial_rotary_factor"),
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": not fields.has("blk.0.ffn_norm.weight"),
        "use_qkv_bias": fields.has("blk.0.attn_q.bias"),
        "qk_layernorm": fields.has("blk.0.attn_q_norm.weight"),
    }


def _smollm3(fields: Fields, sizes: Config) -> Config:
    layers = sizes["num_hidden_layers"]
    return (
        sizes
        | _rms(fields)
        | _rope(fields, sizes)
        | _biases(fields)
        | {"model_type": "smollm3", "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)]}
    )


def _olmo2(fields: Fields, sizes: Config) -> Config:
    windows = fields.get("attention.sliding_window_pattern")
    if windows is None or (isinstance(windows, list) and not any(windows)):
        fields.get("attention.sliding_window")
    elif windows:
        raise fields.wrong("attention.sliding_window_pattern", windows, "no sliding layers, which only OLMo 3 has")
    return sizes | _rms(fields) | _rope(fields, sizes) | {"model_type": "olmo2"}


def _granite(fields: Fields, sizes: Config) -> Config:
    if fields.get("rope.scaling.finetuned") is False:
        raise fields.wrong("rope.scaling.finetuned", False, "true: layers without positions are not supported")
    return (
        sizes
        | _rms(fields)
        | _rope(fields, sizes)
        | _biases(fields)
        | {
            "model_type": "granite",
            "attention_multiplier": fields.number("attention.scale", 0.0) or sizes["head_dim"] ** -0.5,
            "embedding_multiplier": fields.number("embedding_scale", 0.0) or 1.0,
            "residual_multiplier": fields.number("residual_scale", 0.0) or 1.0,
            "logits_scaling": fields.number("logit_scale", 0.0) or 1.0,
        }
    )


_BUILDERS: dict[str, Callable[[Fields, Config], Config]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
}


def _rms(fields: Fields) -> Config:
    return {"rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon")}


def _biases(fields: Fields) -> Config:
    return {
        "attention_bias": fields.has("blk.0.attn_q.bias"),
        "mlp_bias": fields.has("blk.0.ffn_up.bias"),
    }


def _query_scalar(fields: Fields, sizes: Config, largest: int) -> float:
    """What attention logits are divided by the root of; of the family's largest model it is not the head's size."""
    if scale := fields.number("attention.scale", 0.0):
        return scale**-2
    if sizes["num_hidden_layers"] == largest:
        return float(sizes["hidden_size"] // sizes["num_attention_heads"])
    return float(sizes["head_dim"])


def _windows(fields: Fields, sizes: Config, *, period: int, default: int | None) -> Config:
    """Layers that slide: all but every `period`th, unless the file has a pattern of its own."""
    layers = sizes["num_hidden_layers"]
    window = fields.size("attention.sliding_window", default or 0, least=0)
    pattern = fields.get("attention.sliding_window_pattern")
    if pattern is None:
        pattern = period
    if type(pattern) is int and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not set(pattern) <= {0, 1}:
        expected = f"a period, or true or false for each of {layers} layers"
        raise fields.wrong("attention.sliding_window_pattern", pattern, expected)
    types = [SLIDING if slides and window else FULL for slides in pattern]
    return {"layer_types": types, **({"sliding_window": window} if window else {})}


def _rope(fields: Fields, sizes: Config, *, partial: str | None = None) -> Config:
    """The rotary embedding; `partial` is the field with the share of a head that is rotated, if that may be less."""
    head_dim = sizes["head_dim"]
    rotated = fields.size("rope.dimension_count", head_dim)
    if rotated > head_dim or (partial is None and rotated != head_dim):
        raise fields.wrong("rope.dimension_count", rotated, f"{head_dim}, the size of a head")
    config = {
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, sizes, rotated),
    }
    return config if partial is None else config | {partial: _share(rotated, head_dim)}


def _share(rotated: int, head_dim: int) -> float:
    """A share of which `int(head_dim * share)` is what is rotated."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1)


def _rope_scaling(fields: Fields, sizes: Config, rotated: int) -> Config | None:
    context = sizes["max_position_embeddings"]
    kind = fields.get("rope.scaling.type")
    factor = fields.number("rope.scaling.factor", 0.0) or fields.number("rope.scale_linear", 0.0) or 1.0
    original = fields.size("rope.scaling.original_context_length", context)
    factors = {name: _factors(fields.header, name, rotated) for name in CONFIG_TENSORS}
    given = [name for name, values in factors.items() if values is not None]
    path = fields.header.path
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise fields.wrong("rope.scaling.type", kind, "none, linear, yarn or longrope")
    if given and kind in ("linear", "yarn") and factor != 1:
        raise ValueError(f"{path} has {given[0]} and {kind} RoPE scaling, but only one of them is supported")
    if given == [FREQUENCIES]:
        return _by_frequency(factors[FREQUENCIES], sizes, fields)
    if given:
        if given != [LONG_FACTORS, SHORT_FACTORS]:
            raise ValueError(f"{path} has {', '.join(given)}, expected {LONG_FACTORS} and {SHORT_FACTORS} or neither")
        return {
            "rope_type": "longrope",
            "long_factor": factors[LONG_FACTORS],
            "short_factor": factors[SHORT_FACTORS],
            "original_max_position_embeddings": original,
            "attention_factor": fields.number("rope.scaling.attn_factor", 1.0),
        }
    if kind == "longrope":
        raise fields.wrong("rope.scaling.type", kind, f"{LONG_FACTORS} and {SHORT_FACTORS} with it")
    if kind == "yarn":
        return _yarn(fields, factor, original)
    return {"rope_type": "linear", "factor": factor} if factor != 1 and kind != "none" else None


def _yarn(fields: Fields, factor: float, original: int) -> Config:
    if (extrapolation := fields.number("rope.scaling.yarn_ext_factor", 1.0)) != 1:
        raise fields.wrong("rope.scaling.yarn_ext_factor", extrapolation, "1")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    given = {name: fields.number(f"rope.scaling.{key}", 0.0) for name, key in optional.items()}
    return scaling | {name: value for name, value in given.items() if value}


def _by_frequency(factors: list[float] | None, sizes: Config, fields: Fields) -> Config | None:
    """The scaling that divides each frequency by a factor of its own: Llama 3.1's, or else a table of factors."""
    if not factors or set(factors) == {1.0}:
        return None
    theta = fields.number("rope.freq_base", 10000.0)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    kept = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    factor = float(max(factors))
    if np.allclose(1 / ((1 - kept) / factor + kept), factors, rtol=1e-4):
        return {"rope_type": "llama3", "factor": factor, **llama3}
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "original_max_position_embeddings": sizes["max_position_embeddings"],
        "attention_factor": 1.0,
    }


def _factors(header: Header, name: str, rotated: int) -> list[float] | None:
    tensor = header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.shape != (rotated // 2,):
        raise ValueError(f"{header.path}: {name} is {list(tensor.shape)}, expected [{rotated // 2}], one for each pair")
    return [_shortest(value) for value in read_piece(header.tensors, Piece(name)).tolist()]


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same in float32: what was written as 1e-5 is 1e-5 again."""
    return float(np.format_float_positional(np.float32(value)))


def _without(config: Mapping[str, Any], *names: str) -> Config:
    return {name: value for name, value in config.items() if name not in names}
