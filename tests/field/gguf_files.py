"""Writes GGUF files of tiny models as llama.cpp's converter would (convert_hf_to_gguf.py), and damages them.

Names come from the `gguf` package's own maps. What the converter does to rows and numbers is written down here again,
apart from the code under test. llama.cpp itself gives such files the logits of transformers (tried with each family).
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, RopeScalingType, TokenType

from . import folders

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "stablelm": "stablelm",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "granite": "granite",
}
"""Hugging Face's model types, and what files call them."""
_NAMES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
_LIKE_LLAMA = {"llama", "granite", "smollm3"}

Edit = Callable[[dict[str, np.ndarray]], None]


def write_gguf(
    path: Path,
    source: Path,
    *,
    quantize: Type = Type.F32,
    metadata: Mapping[str, Any] | None = None,
    edit: Edit | None = None,
    vocabulary: Callable[[GGUFWriter], None] | None = None,
    alignment: int | None = None,
) -> Path:
    """Writes the model of a Hugging Face folder.

    Args:
        path: the file.
        source: the folder, which `folders.tiny` made.
        quantize: type of the matrices; norms and biases stay in float32, as in llama.cpp.
        metadata: further keys; a key with None is left out.
        edit: changes the tensors, by their names in the file, before they are quantised.
        vocabulary: writes the tokenizer's keys; without, the file says that it has none.
        alignment: of the tensors' data.
    """
    config = folders.read_json(source / "config.json")
    architecture = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    tensors = _tensors(source, config, architecture)
    add_metadata(writer, {**_metadata(config, architecture, tensors), **(metadata or {})})
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary(writer)
    if edit is not None:
        edit(tensors)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor, quantize if tensor.ndim > 1 and "norm" not in name else Type.F32)
    save(writer)
    return path


def save(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: GGUFWriter, name: str, tensor: np.ndarray, kind: Type) -> None:
    data = np.ascontiguousarray(tensor, np.float32)
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Writes keys with the types that llama.cpp gives them: uint32, float32, bool, string or an array."""
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _metadata(config: dict[str, Any], architecture: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    def get(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    hidden, heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
    head_dim = get("head_dim", default=hidden // heads)
    rope = get("rope_parameters", default={})
    rope = rope.get("full_attention", rope)
    keys = {
        "context_length": get("max_position_embeddings", "n_positions"),
        "embedding_length": hidden,
        "block_count": get("num_hidden_layers", "n_layer"),
        "feed_forward_length": get("intermediate_size", "n_inner", default=4 * hidden),
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_eps", "layer_norm_epsilon"),
        "rope.freq_base": rope.get("rope_theta"),
        "expert_count": get("num_local_experts", "num_experts"),
        "expert_used_count": get("num_experts_per_tok"),
        "expert_feed_forward_length": get("moe_intermediate_size"),
        **_rope_scaling(rope),
    }
    if architecture in _LIKE_LLAMA:
        keys |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim}
    if architecture in ("phi3", "stablelm", "gptneox"):
        keys["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * head_dim)
    if architecture in ("stablelm", "gptneox"):
        keys["use_parallel_residual"] = config["use_parallel_residual"]
    if architecture == "phi3":
        original = rope.get("original_max_position_embeddings", config["original_max_position_embeddings"])
        keys["rope.scaling.original_context_length"] = original
        keys["attention.sliding_window"] = get("sliding_window", default=0)
        if "long_factor" in rope:
            tensors["rope_factors_long.weight"] = np.asarray(rope["long_factor"], np.float32)
            tensors["rope_factors_short.weight"] = np.asarray(rope["short_factor"], np.float32)
            scale = config["max_position_embeddings"] / original
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = config["attn_logit_softcapping"]
    if architecture in ("gemma2", "gemma3"):
        keys |= {name: config.get(name) for name in ("final_logit_softcapping",)}
        keys["attention.sliding_window"] = config["sliding_window"]
    if architecture == "granite":
        keys |= {
            "attention.scale": float(config["attention_multiplier"]),
            "embedding_scale": float(config["embedding_multiplier"]),
            "residual_scale": float(config["residual_multiplier"]),
            "logit_scale": float(config["logits_scaling"]),
        }
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(rope, head_dim)
    return {f"{architecture}.{name}": value for name, value in keys.items() if value is not None}


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type")
    if kind == "linear":
        return {"rope.scaling.type": RopeScalingType.LINEAR.value, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        optional = {
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        return {
            "rope.scaling.type": RopeScalingType.YARN.value,
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            **{f"rope.scaling.{key}": float(rope[name]) for name, key in optional.items() if name in rope},
        }
    return {}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by."""
    original, low, high = (
        rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def _tensors(source: Path, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(_NAMES[architecture], layers)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in _stacked(folders.tensors_of(source)).items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        tensors[found] = _as_converted(name, tensor, config, architecture)
    return tensors


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts, and norms of heads, one by one to one tensor with all of them."""
    merged: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        head, mark, tail = next(
            (name.partition(mark) for mark in (".experts.", ".norms.") if mark in name), (name, "", "")
        )
        if not mark:
            merged[name] = tensor
            continue
        number, _, weight = tail.partition(".")
        # The converter's names of stacks: Mixtral's are those of Meta's own files.
        stack = f"{head}.{weight}" if mark == ".norms." else f"{head}.experts.{weight}"
        if ".block_sparse_moe" in stack:
            stack = stack.removeprefix("model.").replace(".block_sparse_moe.", ".feed_forward.")
        parts.setdefault(stack, {})[int(number)] = tensor
    return merged | {name: np.stack([stack[index] for index in sorted(stack)]) for name, stack in parts.items()}


def _as_converted(name: str, tensor: np.ndarray, config: dict[str, Any], architecture: str) -> np.ndarray:
    heads = config.get("num_attention_heads") or config["n_head"]
    if architecture in _LIKE_LLAMA and ".q_proj." in name:
        return neighbours(tensor, heads)
    if architecture in _LIKE_LLAMA and ".k_proj." in name:
        return neighbours(tensor, config.get("num_key_value_heads") or heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    if architecture == "gptneox" and ".query_key_value." in name:
        by_head = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    return tensor


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose halves rotate together, in llama.cpp's order, where neighbours do."""
    size = len(rows) // heads
    order = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


def byte_bpe(pre: str, **options: Any) -> Callable[[GGUFWriter], None]:
    """A byte-level vocabulary with a few merges, a control token and one of the user's own; `options` are its keys."""
    letters = [chr(code) for code in gguf_alphabet()]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "1 2", "i n"]
    tokens = ["<|endoftext|>", *letters, *(merge.replace(" ", "") for merge in merges), "<tool>"]
    types = [TokenType.CONTROL, *[TokenType.NORMAL] * (len(tokens) - 2), TokenType.USER_DEFINED]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        add_metadata(writer, {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, **options})

    return write


def gguf_alphabet() -> list[int]:
    """The characters that stand for bytes in a byte-level vocabulary, by byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [byte if byte in shown else next(others) for byte in range(256)]


SPM_WORDS = (
    "▁",
    "▁the",
    "▁world",
    "▁h",
    "he",
    "ll",
    "hell",
    "hello",
    "▁hello",
    "wor",
    "ld",
    "▁w",
    "or",
    "in",
    "▁▁",
    "th",
)


def spm(words: Iterable[str] = SPM_WORDS, **options: Any) -> Callable[[GGUFWriter], None]:
    """A SentencePiece vocabulary: special tokens, bytes, words by falling score, letters; `options` are its keys."""
    pieces = list(dict.fromkeys([*words, *"abcdefghijklmnopqrstuvwxyz.,!?0123456789"]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|user|>", "  "]
    types = [
        *(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL),
        *[TokenType.BYTE] * 256,
        *[TokenType.NORMAL] * len(pieces),
        *(TokenType.CONTROL, TokenType.USER_DEFINED),
    ]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(index) for index in range(len(pieces))] + [-1000.0] * 2)
        writer.add_token_types(types)
        add_metadata(writer, options)

    return write


def text(value: str) -> bytes:
    """A text as a file has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()
