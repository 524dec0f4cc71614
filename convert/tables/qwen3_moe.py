"""Names in checkpoints of Qwen3-MoE: those of Qwen3, with experts one by one or stacked, as transformers 5 has them."""

from ..layouts import TRANSPOSED
from ..rules import Rule
from . import qwen3
from .llama import LAYER
from .mixtral import STACKED_EXPERTS

RULES = (
    *qwen3.RULES,
    *STACKED_EXPERTS,
    Rule(LAYER + r"mlp\.experts\.(\d+)\.(\w+)\.weight", r"model.layers.\1.mlp.\3[\2]", TRANSPOSED),
)
