"""Tables of names: which tensor of a source checkpoint fills which parameter, one module with `RULES` per family.

Decoders have the tree of parameters of `model/decoder.py`, encoders that of `model/encoder.py`; a table translates the
names that a family's checkpoints have.
"""

from importlib import import_module

from ..rules import Rule


def rules_of(table: str) -> tuple[Rule, ...]:
    """The rules of a family, by the name that its entry in the registry gives."""
    return import_module(f".{table}", __name__).RULES
