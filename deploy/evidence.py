"""What a retention contract asks of a bucket, and what was measured for it: records of the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contract:
    """What every bucket keeps of the reference: exact attention, floating-point weights, keys and values as they are.

    Both configurations predict the tokens of held-out prompts, and are compared at `positions_of` these. One of the two
    bounds is given, the other is None.

    Attributes:
        retain: the least share of these positions at which the most likely token is that of the reference.
        kl: the largest mean of KL(reference || configuration) there, in nats.
    """

    retain: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        if (self.retain is None) == (self.kl is None):
            raise ValueError(f"retain is {self.retain} and kl is {self.kl}, expected one of them: leave the other out")
        if self.retain is not None and not 0 < self.retain <= 1:
            raise ValueError(f"retain is {self.retain}, expected a share of the positions above 0 and up to 1")
        if self.kl is not None and not 0 < self.kl < float("inf"):
            raise ValueError(f"kl is {self.kl}, expected a number of nats above 0")

    def __str__(self) -> str:
        return f"kl {self.kl:g}" if self.retain is None else f"retain {self.retain:g}"

    def holds(self, agreement: float, kl: float) -> bool:
        """Whether a configuration with these figures fulfils the contract."""
        return kl <= self.kl if self.kl is not None else agreement >= (self.retain or 0)

    def kept(self, agreement: float, kl: float) -> str:
        """The figure that the contract asks for, in words."""
        if self.retain is None:
            return f"has a divergence of {kl:.4g} nats"
        return f"keeps {agreement:.5g} of the most likely tokens"


@dataclass(frozen=True)
class Evidence:
    """What a configuration keeps of the reference at a bucket's length, and its speed, from the same reading.

    Attributes:
        attention: of prompts, with its `kind`.
        kv_dtype: of keys and values in the cache.
        weights: "same", or what the kernels of linear layers are rounded to.
        agreement: share of the positions at which the most likely token is that of the reference.
        kl: mean of KL(reference || configuration) there, in nats.
        loss: by how much the mean log-probability of the text's own tokens falls there, in nats.
        positions: how many.
        seconds: that the model's layers took for a prompt, the median over the prompts.
        holds: whether it fulfils the contract.
        chosen: whether the bucket is compiled with it.
    """

    attention: dict[str, Any]
    kv_dtype: str
    weights: str
    agreement: float
    kl: float
    loss: float
    positions: int
    seconds: float
    holds: bool
    chosen: bool

    def __str__(self) -> str:
        return described(self.attention, self.weights, self.kv_dtype)


def positions_of(held_out: str) -> str:
    """The positions at which a contract is judged, from the kind of what it is judged on: in a text those with the most
    keys to choose from."""
    return "the tokens of the answers" if held_out == "task" else "the last quarter of windows as long as the bucket"


def name_of(attention: Mapping[str, Any]) -> str:
    """What an attention for prompts is called beside others that differ in their budget."""
    if attention["kind"] != "two_stage":
        return f"{attention['kind']} attention"
    mass = attention.get("mass")
    return f"mass {mass}" if mass else f"budget {attention.get('budget')}"


def described(attention: Mapping[str, Any], weights: str, kv_dtype: str) -> str:
    """A configuration in words."""
    rounded = [f"{weights} weights"] * (weights != "same") + ["int8 keys and values"] * (kv_dtype == "int8")
    return " with ".join([name_of(attention), *([" and ".join(rounded)] if rounded else [])])
