"""The registry of architectures, by a config's `model_type`. A new architecture is one file, one table of names in
`convert/tables` and one line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from .bert import BertConfig, BertEncoder
from .config import refuse_quantized
from .decoder import CausalLM, DecoderConfig
from .dinov2 import Dinov2Config, Dinov2Encoder, Dinov2WithRegistersConfig
from .distilbert import DistilBertConfig, DistilBertEncoder
from .encoder import Encoder, EncoderConfig
from .granite import GraniteConfig, GraniteForCausalLM
from .llama import LlamaConfig, LlamaForCausalLM
from .lra import LraConfig, LraEncoder
from .mistral import MistralConfig, MistralForCausalLM
from .modernbert import ModernBertConfig, ModernBertEncoder
from .nomic_bert import NomicBertConfig, NomicBertEncoder
from .phi3 import Phi3Config, Phi3ForCausalLM
from .qwen2 import Qwen2Config, Qwen2ForCausalLM
from .qwen3 import Qwen3Config, Qwen3ForCausalLM
from .roberta import RobertaConfig, RobertaEncoder, XlmRobertaConfig
from .smollm3 import SmolLM3Config, SmolLM3ForCausalLM
from .t5 import MT5Config, T5Config, T5Encoder, UMT5Config
from .vit import ViTConfig, ViTEncoder
from .whisper import WhisperConfig, WhisperEncoder


@dataclass(frozen=True)
class Architecture:
    """The classes of one model type; the module's name is the one that configs list under `architectures`.

    Attributes:
        name: as people write it, for tables.
        config: the configuration, read by its `from_hf`: a `DecoderConfig` or an `EncoderConfig`.
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
    "bert": Architecture("BERT", BertConfig, BertEncoder, "bert"),
    "dinov2": Architecture("DINOv2", Dinov2Config, Dinov2Encoder, "dinov2"),
    "dinov2_with_registers": Architecture("DINOv2 with registers", Dinov2WithRegistersConfig, Dinov2Encoder, "dinov2"),
    "distilbert": Architecture("DistilBERT", DistilBertConfig, DistilBertEncoder, "distilbert"),
    "llama": Architecture("Llama 1, 2, 3.x; Vicuna", LlamaConfig, LlamaForCausalLM, "llama"),
    "lra": Architecture("Long Range Arena's Transformer", LraConfig, LraEncoder, "lra"),
    "modernbert": Architecture("ModernBERT", ModernBertConfig, ModernBertEncoder, "modernbert"),
    "nomic_bert": Architecture("Nomic-BERT", NomicBertConfig, NomicBertEncoder, "nomic_bert"),
    "roberta": Architecture("RoBERTa", RobertaConfig, RobertaEncoder, "roberta"),
    "t5": Architecture("T5's encoder", T5Config, T5Encoder, "t5"),
    "mt5": Architecture("mT5's encoder", MT5Config, T5Encoder, "t5"),
    "umt5": Architecture("umT5's encoder", UMT5Config, T5Encoder, "t5"),
    "vit": Architecture("ViT, DINO", ViTConfig, ViTEncoder, "vit"),
    "whisper": Architecture("Whisper's encoder", WhisperConfig, WhisperEncoder, "whisper"),
    "xlm-roberta": Architecture("XLM-RoBERTa", XlmRobertaConfig, RobertaEncoder, "roberta"),
    "mistral": Architecture("Mistral", MistralConfig, MistralForCausalLM, "llama"),
    "qwen2": Architecture("Qwen2, Qwen2.5", Qwen2Config, Qwen2ForCausalLM, "llama"),
    "qwen3": Architecture("Qwen3", Qwen3Config, Qwen3ForCausalLM, "qwen3"),
    "granite": Architecture("Granite", GraniteConfig, GraniteForCausalLM, "llama"),
    "smollm3": Architecture("SmolLM3", SmolLM3Config, SmolLM3ForCausalLM, "llama"),
    "phi3": Architecture("Phi-3, Phi-4", Phi3Config, Phi3ForCausalLM, "phi3"),
}


def build(config: Mapping[str, Any]) -> tuple[Architecture, DecoderConfig | EncoderConfig]:
    """The architecture that a Hugging Face config asks for, and the config checked.

    A config without `model_type` is known by the class name under `architectures`.

    Raises:
        ValueError: an unknown architecture, quantised weights, or a field that the architecture refuses.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type"))) or _by_class_name(config)
    if architecture is None:
        remote = (
            " (its auto_map names code that comes with the model, which is never run)" if config.get("auto_map") else ""
        )
        raise ValueError(
            f"config: model_type is {config.get('model_type')!r} and architectures is {config.get('architectures')!r}"
            f"{remote}, supported model types are: {', '.join(sorted(ARCHITECTURES))}"
        )
    refuse_quantized(config)
    return architecture, architecture.config.from_hf(config)


def abstract_module(
    architecture: Architecture, config: DecoderConfig | EncoderConfig, dtype: DTypeLike
) -> CausalLM | Encoder:
    """The module with shapes and dtypes in place of parameters."""
    return nnx.eval_shape(lambda: architecture.module(config, rngs=nnx.Rngs(0), param_dtype=dtype))


def _by_class_name(config: Mapping[str, Any]) -> Architecture | None:
    names = config.get("architectures")
    if config.get("model_type") is not None or not isinstance(names, list):
        return None
    return next((known for known in ARCHITECTURES.values() if known.module.__name__ in names), None)
