"""`Plan`: the attention of a bucket's prompts and of its decoding; `Auto`, which lets compiling choose; the registry of
strategies and their JSON form.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from .cache import Fields
from .decode_selection import DecodeSelection
from .exact import Exact
from .methods import Constants, method_to_dict
from .strategy import Attention, Selective
from .two_stage import TwoStage
from .values import Values

STRATEGIES: dict[str, type[Attention]] = {
    strategy.kind: strategy for strategy in (Exact, TwoStage, DecodeSelection, Values)
}


@dataclass(frozen=True)
class Plan:
    """The attention of layers that see the whole sequence; layers with a sliding window attend exactly.

    Attributes:
        prompt: for prompts, scoring and encoding.
        decode: for new tokens.
    """

    prompt: Attention = field(default_factory=Exact)
    decode: Attention = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if isinstance(self.prompt, DecodeSelection):
            raise ValueError("prompt is a DecodeSelection, which is for new tokens only: give it as decode")
        prompt, decode = self.prompt.fields(128), self.decode.fields(128)
        shared = prompt.keys() & decode.keys()
        if shared and (self.prompt.rule != self.decode.rule or any(prompt[name] != decode[name] for name in shared)):
            raise ValueError(
                f"prompt is {self.prompt} and decode is {self.decode}, which keep different things under one name: "
                "expected the same method with the same options, and the same key_block where it keeps key blocks"
            )

    @property
    def strategies(self) -> tuple[Attention, ...]:
        """Both, or the one that both are."""
        return (self.prompt,) if self.prompt == self.decode else (self.prompt, self.decode)

    def fields(self, head_dim: int) -> Fields:
        """What both ask the cache to keep."""
        return {name: kept for strategy in self.strategies for name, kept in strategy.fields(head_dim).items()}

    def first_like(self, layer: int) -> int:
        """The first layer, counted from 0, in which both amount to what they do in this one."""
        found = [(self.prompt.of_layer(index), self.decode.of_layer(index)) for index in range(layer + 1)]
        return found.index(found[layer])

    def state(self, layer: int, kv_heads: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What decoding asks the cache to keep of each slot in a layer, counted from 0."""
        return self.decode.of_layer(layer).state(kv_heads)

    def entries(
        self, name: str, key: Float[Array, "heads runs tokens head_dim"], constants: Constants
    ) -> Shaped[Array, "heads runs ..."]:
        """What new keys add to a field of either."""
        owner = next(strategy for strategy in self.strategies if name in strategy.fields(key.shape[3]))
        return owner.entries(name, key, constants)


@dataclass(frozen=True)
class Auto:
    """Exact or two-stage attention for each bucket, whichever `compile` measures to be faster on its machine.

    Attributes:
        two_stage: the two-stage attention to choose from. It must not have a crossover, because that is measured.
        decode: a selection for new tokens, which attend exactly where `compile` measures that to be faster. One with a
            crossover is taken as it is. None for exact attention everywhere.
    """

    two_stage: TwoStage = field(default_factory=TwoStage)
    decode: DecodeSelection | None = None

    def __post_init__(self) -> None:
        if self.two_stage.crossover:
            raise ValueError(
                f"crossover is {self.two_stage.crossover}, but Auto measures it: leave it out, or ask for the TwoStage"
            )
        if self.decode is not None:
            Plan(self.two_stage, self.decode)  # whether they go together


def attention_to_dict(attention: Attention) -> dict[str, Any]:
    """The JSON form of a strategy: its kind and its fields."""
    options = asdict(attention)  # type: ignore[call-overload]
    if isinstance(attention, Selective):
        options["method"] = method_to_dict(attention.ranking)
    return {"kind": attention.kind, **options}


def plan_to_dict(plan: Plan) -> dict[str, dict[str, Any]]:
    """The JSON form of a plan."""
    return {"prompt": attention_to_dict(plan.prompt), "decode": attention_to_dict(plan.decode)}
