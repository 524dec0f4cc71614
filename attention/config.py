"""What a model's attention should be: `Dense` (exact) or `TwoStage` (selected), as frozen, checked dataclasses; and
`Auto`, which lets compiling choose.

They are plain values: hashable, so that jit can take them as static, and they have a JSON form for an artifact's
manifest.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from .blocks import EXACT_KEY_BLOCK, EXACT_QUERY_BLOCK
from .methods import Method, make_method, method_to_dict


@dataclass(frozen=True)
class Dense:
    """Exact attention, computed block by block without an [n, n] array.

    Attributes:
        query_block: queries, in tokens, that are computed together in XLA; the native kernel has blocks of its own.
        key_block: keys, in tokens, that one step of the online softmax takes in XLA.
    """

    query_block: int = EXACT_QUERY_BLOCK
    key_block: int = EXACT_KEY_BLOCK

    def __post_init__(self) -> None:
        _check_power_of_two("query_block", self.query_block)
        _check_power_of_two("key_block", self.key_block)


@dataclass(frozen=True)
class TwoStage:
    """Two-stage top-k attention: rank key blocks cheaply, rank their tokens exactly, attend to the best `budget` keys.

    Every query block shares one selection per KV head. The first `sink` tokens, the query block itself and `local`
    tokens before it (and after it where attention is bidirectional) are always selected and count as budget.

    Attributes:
        method: stage 1, a name from the registry or a method with options of its own, e.g. `LowRank(rank=16)`.
        budget: keys, in tokens, that a query finally attends to.
        query_block: queries, in tokens, that share a selection. 0 chooses 128, and less for a budget below 1024,
            because the queries of a block compete for the budget.
        key_block: keys, in tokens, that stage 1 ranks as one.
        candidates: tokens that stage 1 leaves for stage 2, as a multiple of the budget.
        sink: tokens at the start of the sequence that are always selected.
        local: tokens next to the query block that are always selected; -1 chooses a quarter of `query_block`.
        exact_last_block: attend exactly for the last `query_block` tokens of each row, where a prompt's question
            stands.
        compensation: "block_mean" lets the keys that were left out enter the softmax as one mean key per block.
        crossover: query blocks that see no more than this many keys, in tokens, attend exactly, because that is faster
            there. Where it is below the budget, the budget takes its place.
    """

    method: Method | str = "low_rank"
    budget: int = 1024
    query_block: int = 0
    key_block: int = 8
    candidates: float = 1.5
    sink: int = 8
    local: int = -1
    exact_last_block: bool = True
    compensation: str = "none"
    crossover: int = 0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget is {self.budget}, expected at least 1 key")
        if isinstance(self.method, str):
            object.__setattr__(self, "method", make_method(self.method))
        if self.query_block == 0:
            object.__setattr__(self, "query_block", _default_query_block(self.budget))
        if self.local == -1:
            object.__setattr__(self, "local", self.query_block // 4)
        _check_power_of_two("query_block", self.query_block)
        _check_power_of_two("key_block", self.key_block)
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}, expected a multiple of the budget that is at least 1")
        if self.sink < 0 or self.local < 0:
            raise ValueError(f"sink is {self.sink} and local is {self.local}, expected numbers of tokens >= 0")
        if self.compensation not in ("none", "block_mean"):
            raise ValueError(f"compensation is {self.compensation!r}, expected 'none' or 'block_mean'")
        if self.crossover < 0:
            raise ValueError(f"crossover is {self.crossover}, expected a number of keys >= 0")
        # What is forced is rounded to whole key blocks at the sink and at both ends of the neighbourhood.
        forced = self.sink + 2 * self.local + self.query_block + 3 * self.key_block
        if self.budget < forced:
            raise ValueError(
                f"budget is {self.budget}, but sink, local and the query block itself may force {forced} keys: "
                "raise budget, or lower query_block, local, sink or key_block"
            )

    @property
    def candidate_blocks(self) -> int:
        """Key blocks that stage 1 leaves for stage 2."""
        return -(-int(self.budget * self.candidates) // self.key_block)

    @property
    def exact_keys(self) -> int:
        """Keys, in tokens, up to which a query block attends to all that it sees."""
        return max(self.budget, self.crossover)


def _default_query_block(budget: int) -> int:
    """The largest power of two up to an eighth of the budget, from 8 to 128."""
    return min(128, max(8, 1 << max(0, (budget // 8).bit_length() - 1)))


AttentionConfig = Dense | TwoStage


@dataclass(frozen=True)
class Auto:
    """Exact or two-stage attention for each bucket, whichever `compile` measures to be faster on its machine.

    Attributes:
        two_stage: what two-stage attention is to be; its crossover is what is measured, so it must not have one.
    """

    two_stage: TwoStage = field(default_factory=TwoStage)

    def __post_init__(self) -> None:
        if self.two_stage.crossover:
            raise ValueError(
                f"crossover is {self.two_stage.crossover}, but Auto measures it: leave it out, or ask for the TwoStage"
            )


def method_of(config: TwoStage) -> Method:
    """The stage-1 method, which a configuration may be given by name but always holds as an object."""
    assert isinstance(config.method, Method)
    return config.method


def attention_to_dict(config: AttentionConfig) -> dict[str, Any]:
    """The JSON form of a configuration: its fields and a `kind`."""
    if isinstance(config, Dense):
        return {"kind": "dense", **asdict(config)}
    return {"kind": "two_stage", **asdict(config), "method": method_to_dict(method_of(config))}


def _check_power_of_two(name: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} is {value}, expected a power of two")
