"""The registry of architectures, by a config's `model_type`. A new architecture is one file, one table of names in
`convert/tables` and one line here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from .bert import BertConfig, BertEncoder
from .config import require
from .decoder import CausalLM, DecoderConfig
from .decoder_encoder import encoder_of, with_task
from .dinov2 import Dinov2Config, Dinov2Encoder, Dinov2WithRegistersConfig
from .distilbert import DistilBertConfig, DistilBertEncoder
from .encoder import Encoder, EncoderConfig
from .gemma import GemmaConfig, GemmaForCausalLM
from .gemma2 import Gemma2Config, Gemma2ForCausalLM
from .gemma3 import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig
from .gpt2 import GPT2Config, GPT2LMHeadModel
from .gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM
from .granite import GraniteConfig, GraniteForCausalLM
from .llama import LlamaConfig, LlamaForCausalLM
from .lra import LraConfig, LraEncoder
from .mistral import MistralConfig, MistralForCausalLM
from .mixtral import MixtralConfig, MixtralForCausalLM
from .modernbert import ModernBertConfig, ModernBertEncoder
from .nomic_bert import NomicBertConfig, NomicBertEncoder
from .olmo2 import Olmo2Config, Olmo2ForCausalLM
from .phi3 import Phi3Config, Phi3ForCausalLM
from .qwen2 import Qwen2Config, Qwen2ForCausalLM
from .qwen3 import Qwen3Config, Qwen3ForCausalLM
from .qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from .roberta import RobertaConfig, RobertaEncoder, XLMRobertaConfig
from .smollm3 import SmolLM3Config, SmolLM3ForCausalLM
from .stablelm import StableLmConfig, StableLmForCausalLM
from .t5 import MT5Config, T5Config, T5Encoder, UMT5Config
from .vit import ViTConfig, ViTEncoder
from .whisper import WhisperConfig, WhisperEncoder

ModelConfig = DecoderConfig | EncoderConfig
Model = CausalLM | Encoder


@dataclass(frozen=True)
class Architecture:
    """The classes of one model type.

    The configuration has the name that it has in transformers, and so has a decoder's module.

    Attributes:
        name: for display.
        config: the configuration, a `DecoderConfig` or an `EncoderConfig`. Its `from_hf` raises ValueError for a field
            that is out of range, or asks for mathematics that the model does not have.
        module: the model, built from a configuration.
        table: module of `convert/tables` with the names of its tensors.
        features: what its mathematics have that is special, for people.
    """

    name: str
    config: Any
    module: Any
    table: str
    features: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(
        "Gemma 1", GemmaConfig, GemmaForCausalLM, "llama", "scaled embeddings, RMSNorm weights offset by 1"
    ),
    "gemma2": Architecture(
        "Gemma 2",
        Gemma2Config,
        Gemma2ForCausalLM,
        "gemma2",
        "as Gemma 1, with logit softcapping, pre- and post-norms, local and global layers",
    ),
    "gemma3": Architecture(
        "Gemma 3 with images",
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        "gemma3",
        "language model only, as Gemma 3",
    ),
    "gemma3_text": Architecture(
        "Gemma 3",
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        "gemma3",
        "as Gemma 2, with query and key norms, rotary embeddings per layer type",
    ),
    "gpt2": Architecture("GPT-2", GPT2Config, GPT2LMHeadModel, "gpt2", "learned position embeddings, fused QKV"),
    "gpt_neox": Architecture(
        "GPT-NeoX, Pythia",
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        "gpt_neox",
        "parallel residual, partial rotary embedding, fused QKV",
    ),
    "granite": Architecture(
        "Granite",
        GraniteConfig,
        GraniteForCausalLM,
        "llama",
        "multipliers for embeddings, residuals, attention and logits",
    ),
    "llama": Architecture("Llama 1, 2, 3.x; Vicuna", LlamaConfig, LlamaForCausalLM, "llama", "every RoPE type"),
    "mistral": Architecture("Mistral", MistralConfig, MistralForCausalLM, "llama", "sliding window"),
    "mixtral": Architecture("Mixtral", MixtralConfig, MixtralForCausalLM, "mixtral", "mixture of experts"),
    "olmo2": Architecture(
        "OLMo 2", Olmo2Config, Olmo2ForCausalLM, "olmo2", "post-norms, query and key norms across all heads"
    ),
    "phi3": Architecture(
        "Phi-3, Phi-4",
        Phi3Config,
        Phi3ForCausalLM,
        "phi3",
        "LongRoPE, partial rotary embedding, sliding window, fused QKV",
    ),
    "qwen2": Architecture(
        "Qwen2, Qwen2.5", Qwen2Config, Qwen2ForCausalLM, "llama", "QKV biases, sliding window in some layers"
    ),
    "qwen3": Architecture("Qwen3", Qwen3Config, Qwen3ForCausalLM, "qwen3", "as Qwen2, with query and key norms"),
    "qwen3_moe": Architecture(
        "Qwen3-MoE",
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        "qwen3_moe",
        "as Qwen3, with a mixture of experts in some layers",
    ),
    "smollm3": Architecture(
        "SmolLM3", SmolLM3Config, SmolLM3ForCausalLM, "llama", "some layers without rotary embedding"
    ),
    "stablelm": Architecture(
        "StableLM",
        StableLmConfig,
        StableLmForCausalLM,
        "stablelm",
        "partial rotary embedding, parallel residual, per-head query and key norms",
    ),
    "bert": Architecture("BERT", BertConfig, BertEncoder, "bert", "segment embeddings"),
    "dinov2": Architecture("DINOv2", Dinov2Config, Dinov2Encoder, "dinov2", "LayerScale, images of any fixed size"),
    "dinov2_with_registers": Architecture(
        "DINOv2 with registers", Dinov2WithRegistersConfig, Dinov2Encoder, "dinov2", "as DINOv2, with registers"
    ),
    "distilbert": Architecture(
        "DistilBERT", DistilBertConfig, DistilBertEncoder, "distilbert", "no segment embeddings"
    ),
    "lra": Architecture(
        "Long Range Arena's Transformer", LraConfig, LraEncoder, "lra", "the sizes and names of the published code"
    ),
    "modernbert": Architecture(
        "ModernBERT",
        ModernBertConfig,
        ModernBertEncoder,
        "modernbert",
        "8192 tokens, rotary embeddings, local and global layers",
    ),
    "mt5": Architecture("mT5", MT5Config, T5Encoder, "t5", "encoder only, as T5"),
    "nomic_bert": Architecture(
        "Nomic-BERT", NomicBertConfig, NomicBertEncoder, "nomic_bert", "rotary embeddings, gated MLP"
    ),
    "roberta": Architecture(
        "RoBERTa", RobertaConfig, RobertaEncoder, "roberta", "position ids start after the padding id"
    ),
    "t5": Architecture("T5, Flan-T5", T5Config, T5Encoder, "t5", "encoder only; relative position bias, in XLA"),
    "umt5": Architecture(
        "umT5", UMT5Config, T5Encoder, "t5", "encoder only, as T5 with a relative position bias in every layer"
    ),
    "vit": Architecture("ViT, DINO", ViTConfig, ViTEncoder, "vit", "images of any fixed size"),
    "whisper": Architecture(
        "Whisper", WhisperConfig, WhisperEncoder, "whisper", "encoder only; two convolutions, no key bias"
    ),
    "xlm-roberta": Architecture("XLM-RoBERTa", XLMRobertaConfig, RobertaEncoder, "roberta", "as RoBERTa"),
}


def build(config: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture that a Hugging Face config asks for, and the config checked.

    Raises:
        ValueError: an unknown architecture, or a field that the architecture refuses.
    """
    architecture = find(config)
    if config.get("per_layer_config"):
        raise ValueError("config: per_layer_config has fields for single layers, supported: only one set for all")
    checked = architecture.config.from_hf(config)
    if isinstance(checked, DecoderConfig):
        return architecture, with_task(checked, config)
    require(config, "is_causal", False)
    return architecture, checked


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config asks for.

    A config without `model_type` is known by the class name under `architectures`.

    Raises:
        ValueError: an unknown architecture.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type"))) or _by_class_name(config)
    if architecture is None:
        remote = (
            " (its auto_map names code that comes with the model, which is never run)" if config.get("auto_map") else ""
        )
        raise ValueError(
            f"config: model_type is {config.get('model_type')!r} and architectures is {config.get('architectures')!r}"
            f"{remote}, supported model types: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture


def abstract_module(architecture: Architecture, config: ModelConfig, dtype: DTypeLike) -> Model:
    """The module with shapes and dtypes in place of parameters."""

    def make() -> Model:
        rngs = nnx.Rngs(0)
        module = architecture.module(config, rngs=rngs, param_dtype=dtype)
        encodes = config.kind == "encoder" and isinstance(module, CausalLM)
        return encoder_of(module, rngs=rngs, param_dtype=dtype) if encodes else module

    return nnx.eval_shape(make)


def _by_class_name(config: Mapping[str, Any]) -> Architecture | None:
    names = config.get("architectures")
    if config.get("model_type") or not isinstance(names, list):
        return None
    for is_class in (_is_module, _is_of_family):
        for known in ARCHITECTURES.values():
            if any(is_class(known, str(name)) for name in names):
                return known
    return None


def _is_module(architecture: Architecture, name: str) -> bool:
    return architecture.module.__name__ == name


def _is_of_family(architecture: Architecture, name: str) -> bool:
    """Whether a class of transformers has the architecture's name and an ending: BertModel, BertForMaskedLM ..."""
    family = architecture.config.__name__.removesuffix("Config")
    return re.fullmatch(rf"{family}(?:(?:Encoder|LMHead|DoubleHeads)?Model|Backbone|For[A-Z]\w*)", name) is not None
