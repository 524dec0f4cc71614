"""The registry of architectures, by a config's `model_type`. A new architecture is one file, one table of names in
`convert/tables` and one line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from .bert import BertConfig, BertEncoder
from .config import require
from .decoder import CausalLM, DecoderConfig
from .distilbert import DistilBertConfig, DistilBertEncoder
from .encoder import Encoder, EncoderConfig
from .llama import LlamaConfig, LlamaForCausalLM
from .modernbert import ModernBertConfig, ModernBertEncoder
from .nomic_bert import NomicBertConfig, NomicBertEncoder
from .roberta import RobertaConfig, RobertaEncoder, XlmRobertaConfig


@dataclass(frozen=True)
class Architecture:
    """The classes of one model type; the module's name is the one that configs list under `architectures`.

    Attributes:
        name: as people write it, for tables.
        config: the configuration, read by its `from_hf`: a `DecoderConfig` or an `EncoderConfig`.
        module: the model, built from a configuration.
        table: module of `convert/tables` with the names of its tensors.
    """

    name: str
    config: Any
    module: Any
    table: str


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BERT", BertConfig, BertEncoder, "bert"),
    "distilbert": Architecture("DistilBERT", DistilBertConfig, DistilBertEncoder, "distilbert"),
    "llama": Architecture("Llama 1, 2, 3.x; Vicuna", LlamaConfig, LlamaForCausalLM, "llama"),
    "modernbert": Architecture("ModernBERT", ModernBertConfig, ModernBertEncoder, "modernbert"),
    "nomic_bert": Architecture("Nomic-BERT", NomicBertConfig, NomicBertEncoder, "nomic_bert"),
    "roberta": Architecture("RoBERTa", RobertaConfig, RobertaEncoder, "roberta"),
    "xlm-roberta": Architecture("XLM-RoBERTa", XlmRobertaConfig, RobertaEncoder, "roberta"),
}


def build(config: Mapping[str, Any]) -> tuple[Architecture, DecoderConfig | EncoderConfig]:
    """The architecture that a Hugging Face config asks for, and the config checked.

    A config without `model_type` is known by the class name under `architectures`.

    Raises:
        ValueError: an unknown architecture, or a field that the architecture refuses.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type"))) or _by_class_name(config)
    if architecture is None:
        raise ValueError(
            f"config: model_type is {config.get('model_type')!r} and architectures is {config.get('architectures')!r}, "
            f"supported model types are: {', '.join(sorted(ARCHITECTURES))}"
        )
    require(config, "quantization_config", None)
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
