"""The tasks of an evaluation, by name."""

from collections.abc import Callable

from .examples import HiddenAnswer, Setting, key_value, lines, passkey, repetition
from .ruler import common_words, frequent_words, multi_key, multi_query, multi_value, needle, variable_tracking

TASKS: dict[str, Callable[[Setting], list[HiddenAnswer]]] = {
    task.__name__: task
    for task in (
        passkey,
        needle,
        lines,
        key_value,
        repetition,
        multi_key,
        multi_value,
        multi_query,
        variable_tracking,
        common_words,
        frequent_words,
    )
}
"""Each gives an example for each depth, or one where there are none, all over one context."""
