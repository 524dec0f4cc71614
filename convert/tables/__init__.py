"""Tables of names: which tensor of a source checkpoint fills which parameter, one module with `RULES` per family, or
with `rules(config)` where a layout depends on the model's sizes.

Decoders have the tree of parameters of `model/decoder.py`, encoders that of `model/encoder.py`; a table translates the
names that a family's checkpoints have.
"""

from importlib import import_module

from ...model.decoder import DecoderConfig
from ...model.encoder import EncoderConfig
from ..rules import Rule


def rules_of(table: str, config: DecoderConfig | EncoderConfig) -> tuple[Rule, ...]:
    """The rules of a family, by the name that its entry in the registry gives, for a model's configuration."""
    module = import_module(f".{table}", __name__)
    return module.rules(config) if hasattr(module, "rules") else module.RULES
