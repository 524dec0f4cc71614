"""Parameters of which most are slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def few(parameters: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Parameters of a test, which is slow for all that are not chosen; a tuple has one for each argument."""
    given = list(parameters)
    assert all(parameter in given for parameter in chosen)
    return [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=() if each in chosen else pytest.mark.slow)
        for each in given
    ]
