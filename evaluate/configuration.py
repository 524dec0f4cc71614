"""What an evaluation compares with exact attention: an attention, and the number formats of weights and KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..attention import Attention, DecodeSelection, Exact, TwoStage, attention_to_dict
from ..deploy.compile import KV_DTYPES, WEIGHTS, check_activations

REFERENCE = "exact"
"""The name of what all others are compared with: exact attention, nothing rounded."""


@dataclass(frozen=True)
class Configuration:
    """One way to run the model.

    Attributes:
        attention: of prompts, in the layers that see the whole sequence.
        weights: of linear layers: "same" as the evaluation's dtype, "bfloat16", "int8" or "int4".
        activations: of prompts where linear layers with int8 weights multiply them: "same", "int8" or "int16".
        kv_dtype: of the KV cache: "same" as the evaluation's dtype, or "int8".
    """

    attention: Attention = field(default_factory=TwoStage)
    weights: str = "same"
    activations: str = "same"
    kv_dtype: str = "same"

    def __post_init__(self) -> None:
        if isinstance(self.attention, DecodeSelection):
            raise ValueError("attention is a DecodeSelection, which is for new tokens: an evaluation reads prompts")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}, expected one of: {', '.join(WEIGHTS)}")
        check_activations(self.activations, self.weights)
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype is {self.kv_dtype!r}, expected one of: {', '.join(KV_DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "attention": attention_to_dict(self.attention),
            "weights": self.weights,
            "activations": self.activations,
            "kv_dtype": self.kv_dtype,
        }


def with_reference(configurations: Mapping[str, Configuration]) -> dict[str, Configuration]:
    """The configurations behind the reference.

    Raises:
        ValueError: none, or one that has the reference's name or no name.
    """
    if not configurations:
        raise ValueError("configurations is empty, expected at least one to compare with exact attention")
    for name in configurations:
        if name == REFERENCE or not name.strip():
            raise ValueError(f"a configuration has the name {name!r}, expected one that is not empty or {REFERENCE!r}")
    return {REFERENCE: Configuration(Exact()), **configurations}
