"""Attention as pure functions on arrays: exact, and two-stage with a top-k selection of the keys."""

from .cache import Field, KVCache, LayerCache, extend
from .decode_selection import DecodeSelection
from .dispatch import attend, attend_and_keep, heard, listening
from .exact import Exact
from .keys import KeyView
from .methods import METHODS, Constants, LowRank, MeanPool, Method, PageBound, Sparq, make_method
from .plan import Auto, Plan, attention_to_dict, plan_to_dict
from .rows import Mask, Rows
from .strategy import Attention, Call
from .two_stage import TwoStage
from .values import Values

__all__ = [
    "METHODS",
    "Attention",
    "Auto",
    "Call",
    "Constants",
    "DecodeSelection",
    "Exact",
    "Field",
    "KVCache",
    "KeyView",
    "LayerCache",
    "LowRank",
    "Mask",
    "MeanPool",
    "Method",
    "PageBound",
    "Plan",
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
]
