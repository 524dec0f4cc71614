"""Tables of names: which tensor of a source checkpoint fills which parameter, one module with `RULES` per family, or
with `rules(config)` where a layout depends on the model's sizes.

Decoders have the tree of parameters of `model/decoder.py`, encoders that of `model/encoder.py`; a table translates the
names that a family's checkpoints have. That of a decoder which encodes is made of the decoder's.
"""

from dataclasses import replace
from importlib import import_module

from ...model.decoder import DecoderConfig
from ...model.encoder import EncoderConfig
from ..layouts import TRANSPOSED
from ..rules import Rule
from .llama import WRAPPER

_IN_AN_ENCODER = {
    "model.embed_tokens.": "embeddings.word_embeddings.",
    "model.embed_positions.": "embeddings.position_embeddings.",
    "model.": "",
}
"""Where a decoder's parameters are in the tree of an encoder, by the beginnings of their names."""
_HEADS = {
    "sequence_classification": "score",
    # GPT-2 and GPT-NeoX have the second name.
    "token_classification": "score|classifier",
    "question_answering": "qa_outputs",
}


def rules_of(table: str, config: DecoderConfig | EncoderConfig) -> tuple[Rule, ...]:
    """The rules of a family, by the name that its entry in the registry gives, for a model's configuration."""
    module = import_module(f".{table}", __name__)
    rules = module.rules(config) if hasattr(module, "rules") else module.RULES
    if isinstance(config, DecoderConfig) and config.kind == "encoder":
        return (*(_in_an_encoder(rule) for rule in rules), *_head(config.task))
    return rules


def _in_an_encoder(rule: Rule) -> Rule:
    """A decoder's rule for the tree of an encoder, which leaves the output layer out."""
    targets = (rule.target,) if isinstance(rule.target, str) else rule.target or ()
    kept = tuple(_place_in_an_encoder(target) for target in targets if not target.startswith("lm_head."))
    return replace(rule, target=kept or None, tied_to=None)


def _place_in_an_encoder(target: str) -> str:
    outside = next(name for name in _IN_AN_ENCODER if target.startswith(name))
    return _IN_AN_ENCODER[outside] + target.removeprefix(outside)


def _head(task: str) -> tuple[Rule, ...]:
    """The rules of the task's head; those that other tasks left behind are left out."""
    others = Rule(rf"{WRAPPER}(?:{'|'.join(_HEADS.values())})\.(?:weight|bias)", None)
    if task not in _HEADS:
        return (others,)
    name = rf"{WRAPPER}(?:{_HEADS[task]})"
    return (
        Rule(rf"{name}\.weight", "head.out.kernel", TRANSPOSED),
        Rule(rf"{name}\.bias", "head.out.bias"),
        others,
    )
