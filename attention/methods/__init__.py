"""The registry of selection methods: one file per published method, one line here."""

from dataclasses import asdict
from typing import Any, TypeVar

from .antidiagonal import Antidiagonal
from .base import Constants, Method, RankingQueries
from .clusters import Clusters
from .iceformer import Iceformer
from .label_cache import LabelCache
from .low_rank import LowRank
from .lsh import Lsh
from .mean_pool import MeanPool
from .page_bound import PageBound
from .product_quant import ProductQuant
from .sparq import Sparq

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LowRank,
        LabelCache,
        ProductQuant,
        Sparq,
        MeanPool,
        Clusters,
        PageBound,
        Antidiagonal,
        Iceformer,
        Lsh,
    )
}

__all__ = [
    "METHODS",
    "Antidiagonal",
    "Clusters",
    "Constants",
    "Iceformer",
    "LabelCache",
    "LowRank",
    "Lsh",
    "MeanPool",
    "Method",
    "PageBound",
    "ProductQuant",
    "RankingQueries",
    "Sparq",
    "make_method",
    "method_to_dict",
    "register_method",
]

_M = TypeVar("_M", bound=type[Method])


def register_method(method: _M) -> _M:
    """Adds a method to the registry, so that it may be given by its name; a decorator of its class.

    Raises:
        ValueError: another class has that name.
    """
    taken = METHODS.setdefault(method.name, method)
    if taken is not method:
        raise ValueError(
            f"method {method.name!r} is {taken.__module__}.{taken.__qualname__} already: give the new one another name"
        )
    return method


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
