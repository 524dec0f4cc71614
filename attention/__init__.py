"""Attention as pure functions on arrays: exact, and two-stage with a top-k selection of the keys."""

from .cache import Field, KVCache, LayerCache, extend
from .decode_selection import DecodeSelection
from .dispatch import attend, attend_and_keep, heard, listening
from .exact import Exact
from .keys import KeyView
from .methods import (
    METHODS,
    Antidiagonal,
    Clusters,
    Constants,
    Iceformer,
    LabelCache,
    LowRank,
    Lsh,
    MeanPool,
    Method,
    PageBound,
    ProductQuant,
    Sparq,
    make_method,
    register_method,
)
from .plan import Auto, Plan, attention_to_dict, plan_to_dict
from .rows import Mask, Rows
from .strategy import Attention, Call
from .two_stage import TwoStage
from .values import Values

__all__ = [
    "METHODS",
    "Antidiagonal",
    "Attention",
    "Auto",
    "Call",
    "Clusters",
    "Constants",
    "DecodeSelection",
    "Exact",
    "Field",
    "Iceformer",
    "KVCache",
    "KeyView",
    "LabelCache",
    "LayerCache",
    "LowRank",
    "Lsh",
    "Mask",
    "MeanPool",
    "Method",
    "PageBound",
    "Plan",
    "ProductQuant",
    "Rows",
    "Sparq",
    "TwoStage",
    "Values",
    "attend",
    "attend_and_keep",
    "attention_to_dict",
    "extend",
    "heard",
    "listening",
    "make_method",
    "plan_to_dict",
    "register_method",
]
