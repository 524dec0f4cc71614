"""Tables of names: which tensor of a source checkpoint fills which parameter, one module with `RULES` per family, or
with `rules(config)` where a layout depends on the model's sizes.

`HEADS` has further rules by task, of the tensors that go with it. Those of the tasks that a model is not for, and what
matches `SPARE`, are left out of it: pre-training and earlier tasks leave them in checkpoints.

Decoders have the tree of parameters of `model/decoder.py`, encoders that of `model/encoder.py`; a table translates the
names that a family's checkpoints have. That of a decoder which encodes is made of the decoder's.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module

from ...model.decoder import DecoderConfig
from ...model.encoder import EncoderConfig
from ..layouts import TRANSPOSED
from ..rules import Rule

_IN_AN_ENCODER = {
    "model.embed_tokens.": "embeddings.word_embeddings.",
    "model.embed_positions.": "embeddings.position_embeddings.",
    "model.": "",
}
"""Where a decoder's parameters are in the tree of an encoder, by the beginnings of their names."""
# Value heads that TRL trains beside a language model.
_SPARE = (r"v_head\..*",)


def rules_of(table: str, config: DecoderConfig | EncoderConfig) -> tuple[Rule, ...]:
    """The rules of a family, by the name that its entry in the registry gives, for a model's configuration."""
    module = import_module(f".{table}", __name__)
    rules = module.rules(config) if hasattr(module, "rules") else module.RULES
    heads: Mapping[str, tuple[Rule, ...]] = getattr(module, "HEADS", {})
    if isinstance(config, DecoderConfig):
        heads = _DECODERS_HEADS
        if config.kind == "encoder":
            rules = tuple(_in_an_encoder(rule) for rule in rules)
    used = (*rules, *heads.get(config.task, ()))
    patterns = {rule.pattern for head in heads.values() for rule in head} - {rule.pattern for rule in used}
    spare = sorted({*patterns, *_SPARE, *getattr(module, "SPARE", ())})
    return (*used, *(Rule(pattern, None, spare=True) for pattern in spare))


def _head(*names: str) -> tuple[Rule, ...]:
    """The rules of a decoder's head, which has one of the names."""
    return (
        *(Rule(rf"{name}\.weight", "head.out.kernel", TRANSPOSED) for name in names),
        *(Rule(rf"{name}\.bias", "head.out.bias") for name in names),
    )


_DECODERS_HEADS = {
    "sequence_classification": _head("score"),
    # GPT-2 and GPT-NeoX have the second name.
    "token_classification": _head("score", "classifier"),
    "question_answering": _head("qa_outputs"),
}


def _in_an_encoder(rule: Rule) -> Rule:
    """A decoder's rule for the tree of an encoder, which leaves the output layer out."""
    targets = (rule.target,) if isinstance(rule.target, str) else rule.target or ()
    kept = tuple(_place_in_an_encoder(target) for target in targets if not target.startswith("lm_head."))
    return replace(rule, target=kept or None, tied_to=None)


def _place_in_an_encoder(target: str) -> str:
    outside = next(name for name in _IN_AN_ENCODER if target.startswith(name))
    return _IN_AN_ENCODER[outside] + target.removeprefix(outside)
