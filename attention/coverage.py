"""How many keys a configuration attends to, counted from its blocks; needs no model and no data."""

from .strategy import Attention
from .two_stage import TwoStage


def keys_attended(config: Attention, length: int) -> float:
    """The share of visible keys that the queries of a causal prompt attend to, 1.0 where attention is exact; by mass,
    at most.

    Args:
        config: the attention.
        length: tokens of the prompt.
    """
    visible = length * (length + 1) // 2
    if not isinstance(config, TwoStage) or length <= config.exact_keys:
        return 1.0
    size = config.query_block
    attended = 0
    for start in range(0, length, size):
        end = min(start + size, length)
        last_block = config.exact_last_block and end > length - size
        for position in range(start, end):
            # A selection counts the whole query block, of which a query sees what stands before it.
            selected = min(config.most_keys, end) - (end - 1 - position)
            attended += position + 1 if last_block or start + size <= config.exact_keys else selected
    return attended / visible
