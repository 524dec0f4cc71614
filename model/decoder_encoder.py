"""Decoders as encoders: embedders, which give hidden states and what pooling makes of them, and classifiers.

The class under a config's `architectures` says which of them a model is; the layers are those of the decoder.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from .config import require
from .decoder import CausalLM, DecoderConfig
from .encoder import Encoder, Head, TextEmbeddings, read_num_labels
from .modules import Linear

GENERATION, FEATURES = "text_generation", "features"
_TASKS = {
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "ForConditionalGeneration": GENERATION,
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "Model": FEATURES,
}
"""What a decoder is for, by the end of its class's name."""
_NUM_LABELS = {FEATURES: 0, "question_answering": 2}
"""Of tasks that a config has no say in."""
# Classes with a head of another kind end in "Model" as well: GPT2DoubleHeadsModel, Qwen2ForRewardModel.
_CLASS = re.compile(rf"((?:(?!For|Heads)\w)+?)({'|'.join(_TASKS)})")


def read_decoder_task(config: Mapping[str, Any]) -> str:
    """What the model is for, from the class name under `architectures`; "text_generation" if there is none.

    Raises:
        ValueError: a class for something else.
    """
    names = config.get("architectures")
    if not names:
        return GENERATION
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else repr(names)
    match = _CLASS.fullmatch(name)
    if match is None:
        raise ValueError(f"config: architectures names {name}, supported: classes that end in: {', '.join(_TASKS)}")
    return _TASKS[match[2]]


def base_class(name: str) -> str:
    """The class without a head that belongs to a class of transformers: LlamaModel for LlamaForCausalLM."""
    match = _CLASS.fullmatch(name)
    assert match is not None
    return f"{match[1]}Model"


def with_task(config: DecoderConfig, fields: Mapping[str, Any]) -> DecoderConfig:
    """The configuration for what the Hugging Face config `fields` says that the model is for.

    Raises:
        ValueError: a class for something else, or a language model whose tokens see those after them.
    """
    task, text = read_decoder_task(fields), fields.get("text_config")
    text = text if isinstance(text, Mapping) else fields
    if not _read_is_causal(text):
        # Windows to both sides count as far as they say in transformers, those to one side the token itself as well.
        windows = tuple(None if window is None else window + 1 for window in config.windows)
        config = replace(config, causal=False, windows=windows)
    if task == GENERATION:
        if not config.causal:
            raise ValueError(
                "config: is_causal is false, or use_bidirectional_attention is true, so that the model cannot write "
                "text: name its base class under architectures to convert it as an encoder"
            )
        return config
    require(fields, "token_classification_bias", True)
    return replace(
        config,
        task=task,
        num_labels=_NUM_LABELS[task] if task in _NUM_LABELS else read_num_labels(fields),
        pad_token_id=_read_pad_token_id(text, config.default_pad_token_id),
    )


def encoder_of(decoder: CausalLM, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> Encoder:
    """The encoder that a decoder without its output layer is, with the head of its configuration's task."""
    config, body = decoder.config, decoder.model
    embeddings = TextEmbeddings(
        config.hidden_size,
        vocab_size=config.vocab_size,
        positions=body.embed_positions or 0,
        token_types=0,
        norm=None,
        multiplier=decoder.embedding_multiplier,
        rngs=rngs,
        param_dtype=param_dtype,
    )
    head = None
    if config.num_labels:
        use_bias = config.task != "sequence_classification"
        out = Linear(config.hidden_size, config.num_labels, use_bias=use_bias, rngs=rngs, param_dtype=param_dtype)
        head = Head(out=out)
    return Encoder(config, embeddings, body.layers, norm=body.norm, head=head, head_pooling="last")


def _read_is_causal(config: Mapping[str, Any]) -> bool:
    """`is_causal`, a field of every decoder in transformers, where unlike in other fields null would mean false."""
    value = config.get("is_causal", True)
    if not isinstance(value, bool):
        raise ValueError(f"config: is_causal is {value!r}, expected true or false")
    return value


def _read_pad_token_id(config: Mapping[str, Any], default: int | None) -> int | None:
    """`pad_token_id`; unlike in other fields null is not the default but means none."""
    value = config.get("pad_token_id", default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"config: pad_token_id is {value!r}, expected a token id or null")
    return value
