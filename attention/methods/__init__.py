"""The registry of selection methods: one file per published method, one line here."""

from dataclasses import asdict
from typing import Any

from .base import Constants, Method, RankingQueries
from .low_rank import LowRank
from .mean_pool import MeanPool
from .page_bound import PageBound
from .sparq import Sparq

METHODS: dict[str, type[Method]] = {method.name: method for method in (LowRank, MeanPool, PageBound, Sparq)}

__all__ = [
    "METHODS",
    "Constants",
    "LowRank",
    "MeanPool",
    "Method",
    "PageBound",
    "RankingQueries",
    "Sparq",
    "make_method",
    "method_to_dict",
]


def make_method(name: str, **options: Any) -> Method:
    """The method of that name, with its options.

    Raises:
        ValueError: no such method, or an option that it does not have.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of: {', '.join(sorted(METHODS))}")
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"method {name!r} does not take these options: {options}") from error


def method_to_dict(method: Method) -> dict[str, Any]:
    """The JSON form of a method: its name and its options."""
    return {"name": method.name, **asdict(method)}
