"""Models of random weights by shape, as ordinary Hugging Face folders that every engine can open. Needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..host.files import new_folder


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama model.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: query heads; head_dim is hidden / heads.
        kv_heads: key and value heads.
        mlp: width inside the MLP.
        vocab: entries of the vocabulary.
    """

    hidden: int = 768
    layers: int = 4
    heads: int = 12
    kv_heads: int = 12
    mlp: int = 2048
    vocab: int = 32000

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.mlp, self.vocab) < 1:
            raise ValueError(f"{self}: expected sizes of at least 1")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"{self}: expected hidden a multiple of heads, and heads a multiple of kv_heads")

    @property
    def dense_flops_per_token(self) -> int:
        """Floating-point operations of the linear layers for one token of a prompt, the output layer left out."""
        key_width = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * key_width
        return 2 * self.layers * (attention + 3 * self.hidden * self.mlp)


def write_random_model(folder: Path, shape: ModelShape, context: int, dtype: str, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors with normal weights of standard deviation 0.02, whole or not at all.

    Args:
        folder: the Hugging Face folder to write, which must not exist.
        shape: the sizes.
        context: positions that the model takes, in tokens.
        dtype: of the weights, "float32" or "bfloat16".
        seed: of the weights.

    Raises:
        FileExistsError: the folder exists.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    rng = np.random.default_rng(seed)
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    tensors = {
        name: np.ones(size, kind)
        if len(size) == 1
        else (rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)).astype(kind)
        for name, size in _tensors(shape).items()
    }
    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them."""
    hidden, key_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (key_width, hidden),
            prefix + "self_attn.v_proj.weight": (key_width, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (shape.mlp, hidden),
            prefix + "mlp.up_proj.weight": (shape.mlp, hidden),
            prefix + "mlp.down_proj.weight": (hidden, shape.mlp),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return tensors
