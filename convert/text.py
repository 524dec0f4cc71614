"""text.json of a checkpoint: how texts become tokens, and what is made of the model's results, as its source asks."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..host.messages import joined, shown
from ..model.pooling import Dense, EmbeddingConfig, Normalize
from ..model.registry import ModelConfig
from .json_file import read_json
from .sentence_transformers import MODEL_CONFIG, TRANSFORMER_CONFIGS, SentenceFolder, read_activation, read_optional

TEXT = "text.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_UNLIMITED = 10**20
"""From here on a tokenizer's `model_max_length` stands for no limit."""
# Tokenizers that number the texts of a pair; a name may end in Fast.
_WITH_SEGMENTS = (
    *("BertTokenizer", "CanineTokenizer", "ConvBertTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer"),
    *("DPRQuestionEncoderTokenizer", "ElectraTokenizer", "FNetTokenizer", "LxmertTokenizer", "MobileBertTokenizer"),
)
_TYPES_WITH_SEGMENTS = ("bert", "nomic_bert")
"""Models whose tokenizer is one of those where none is named."""
_STEPS = {"dense": Dense, "normalize": Normalize}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What an encoder of text does beside its layers.

    Attributes:
        segments: whether token types mark the second text of a pair.
        max_seq_length: texts are cut at so many tokens, special tokens included; None if they are not.
        truncation_side: where a text that is too long loses tokens, "right" or "left".
        prompts: texts by name that may be put in front of a text.
        default_prompt_name: the one that is, where a caller names none.
        embedding: of a sentence embedder.
        truncate_dim: a sentence embedding is cut at so many numbers.
        similarity_fn_name: what its embeddings are to be compared with, for people.
        score_activation: of a classifier of whole texts, as `Encoder` has it.
    """

    segments: bool = True
    max_seq_length: int | None = None
    truncation_side: str = "right"
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    embedding: EmbeddingConfig | None = None
    truncate_dim: int | None = None
    similarity_fn_name: str | None = None
    score_activation: str | None = None

    def to_json(self) -> str:
        """The text of text.json."""
        fields = dataclasses.asdict(self)
        if self.embedding is not None:
            names = {cls: name for name, cls in _STEPS.items()}
            fields["embedding"]["steps"] = [
                {"kind": names[type(step)], **dataclasses.asdict(step)} for step in self.embedding.steps
            ]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def text_settings(
    folder: SentenceFolder | None, root: Path, fields: Mapping[str, Any], config: ModelConfig
) -> TextSettings:
    """How an encoder takes texts.

    Args:
        folder: what sentence-transformers saved, or None for another folder.
        root: the folder of config.json and the tokenizer.
        fields: of config.json.
        config: read from them.

    Raises:
        ValueError: a field of the wrong type, or that asks for what is not supported.
    """
    tokenizer = read_optional(root / TOKENIZER_CONFIG)
    options = {} if folder is None else folder.options
    tokenizer |= _loading(options)
    cuts = folder is not None or _is_cross_encoder(fields)
    classifies = config.task == "sequence_classification"
    if folder is not None and folder.embedding is None and not classifies:
        raise ValueError(
            f"{MODEL_CONFIG} asks for scores, but {config.model_type} is converted for {config.task}: name its class "
            "ForSequenceClassification under architectures in the config, with the weights of its head"
        )
    settings = TextSettings(
        segments=_has_segments(tokenizer, fields),
        max_seq_length=_max_seq_length(options, tokenizer, fields, config) if cuts else None,
        truncation_side=_truncation_side(tokenizer, root) if cuts else "right",
        score_activation=_score_activation(folder, fields, config.num_labels) if classifies else None,
        **({} if folder is None else _prompts(folder)),
    )
    if settings.embedding is not None:
        settings.embedding.size(config.hidden_size)
    return settings


def read_text_settings(checkpoint: Path) -> TextSettings | None:
    """The settings of a checkpoint; None for a model that takes no texts, and for a decoder.

    Raises:
        ValueError: text.json is not as `to_json` writes it.
    """
    if not (checkpoint / TEXT).exists():
        return None
    fields = read_json(checkpoint / TEXT)
    try:
        if fields.get("embedding") is not None:
            fields["embedding"] = _embedding(fields["embedding"])
        return TextSettings(**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{checkpoint / TEXT} cannot be read ({error}): convert the source again") from error


def _embedding(fields: Mapping[str, Any]) -> EmbeddingConfig:
    steps = []
    for step in fields["steps"]:
        options = dict(step)
        steps.append(_STEPS[options.pop("kind")](**options))
    return EmbeddingConfig(tuple(fields["modes"]), fields["include_prompt"], tuple(steps))


def _prompts(folder: SentenceFolder) -> dict[str, Any]:
    """The settings that config_sentence_transformers.json gives."""
    config = folder.config
    prompts = config.get("prompts") or {}
    texts = [*prompts, *prompts.values()] if isinstance(prompts, Mapping) else []
    if not isinstance(prompts, Mapping) or not all(text is None or _is_text(text) for text in texts):
        raise ValueError(f"{MODEL_CONFIG}: prompts is {shown(repr(prompts))}, expected texts by name")
    # What encode_query and encode_document of sentence-transformers look for is there in every embedder.
    known = {"query": "", "document": ""} if folder.embedding is not None else {}
    prompts = known | {name: text or "" for name, text in prompts.items()}
    default = config.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise ValueError(
            f"{MODEL_CONFIG}: default_prompt_name is {shown(repr(default))}, expected one of: "
            f"{joined(list(prompts)) or '(none)'}"
        )
    if folder.embedding is None:
        return {"prompts": prompts, "default_prompt_name": default}
    truncate_dim = config.get("truncate_dim")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise ValueError(
            f"{MODEL_CONFIG}: truncate_dim is {shown(repr(truncate_dim))}, expected a whole number above 0, or null"
        )
    similarity = config.get("similarity_fn_name")
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "embedding": folder.embedding,
        "truncate_dim": truncate_dim,
        "similarity_fn_name": None if similarity is None else str(similarity),
    }


def _is_text(value: Any) -> bool:
    """Whether it is text, without halves of surrogate pairs, which JSON may hold."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_cross_encoder(fields: Mapping[str, Any]) -> bool:
    """Whether sentence-transformers left its mark in config.json, as it does in cross-encoders."""
    return any(
        fields.get(name) is not None for name in ("sentence_transformers", "sbert_ce_default_activation_function")
    )


def _score_activation(folder: SentenceFolder | None, fields: Mapping[str, Any], num_labels: int) -> str:
    """What `CrossEncoder.predict` puts behind the logits: a sigmoid for one label if the files name nothing else.

    Of a folder that is not sentence-transformers', a regression has its logit.
    """
    own = fields.get("sentence_transformers") or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"config: sentence_transformers is {shown(repr(own))}, expected an object")
    given = {
        MODEL_CONFIG: None if folder is None else folder.config.get("activation_fn"),
        "config: sentence_transformers": own.get("activation_fn"),
        "config: sbert_ce_default_activation_function": fields.get("sbert_ce_default_activation_function"),
    }
    for where, name in given.items():
        if name:
            return read_activation(name, where)
    regression = folder is None and not own and fields.get("problem_type") == "regression"
    return "Sigmoid" if num_labels == 1 and not regression else "Identity"


def _max_seq_length(
    options: Mapping[str, Any], tokenizer: Mapping[str, Any], fields: Mapping[str, Any], config: ModelConfig
) -> int | None:
    """Where sentence-transformers cuts: where the folder says, else at the tokenizer's limit and the model's."""
    asked = _loading(options).get("model_max_length", options.get("max_seq_length"))
    if asked is not None:
        return _read_limit(asked, f"{TRANSFORMER_CONFIGS[0]}: max_seq_length")
    positions = getattr(config, "max_position_embeddings", fields.get("max_position_embeddings"))
    limits = [
        _read_limit(tokenizer.get("model_max_length"), f"{TOKENIZER_CONFIG}: model_max_length"),
        None if positions == -1 else _read_limit(positions, "config: max_position_embeddings"),
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _loading(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments with which a Transformer module loads its tokenizer."""
    return options.get("processor_kwargs") or options.get("tokenizer_args") or {}


def _read_limit(value: Any, where: str) -> int | None:
    """A number of tokens; None for no limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
        raise ValueError(f"{where} is {shown(repr(value))}, expected a whole number above 0")
    return None if value >= _UNLIMITED else int(value)


def _truncation_side(tokenizer: Mapping[str, Any], root: Path) -> str:
    """That of tokenizer_config.json, else of tokenizer.json."""
    side = tokenizer.get("truncation_side")
    if side is None:
        truncation = read_optional(root / "tokenizer.json").get("truncation")
        side = truncation.get("direction", "right") if isinstance(truncation, Mapping) else "right"
    if str(side).lower() not in ("right", "left"):
        raise ValueError(f"{TOKENIZER_CONFIG}: truncation_side is {shown(repr(side))}, expected right or left")
    return str(side).lower()


def _has_segments(tokenizer: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether the tokenizer gives token types: those that it names as inputs, or the ones of its class."""
    names = tokenizer.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    kind = tokenizer.get("tokenizer_class")
    if isinstance(kind, str):
        return kind.removesuffix("Fast") in _WITH_SEGMENTS
    return fields.get("model_type") in _TYPES_WITH_SEGMENTS
