"""Names in checkpoints of Mixtral: those of Llama, with experts one by one or stacked, as transformers 5 has them."""

from ..layouts import JOINED, TRANSPOSED
from ..rules import Rule
from . import llama
from .llama import LAYER

BLOCK = LAYER + r"(?:block_sparse_moe|mlp)\."
STACKED_EXPERTS = (
    Rule(BLOCK + r"gate\.weight", r"model.layers.\1.mlp.gate.kernel", TRANSPOSED),
    Rule(
        LAYER + r"mlp\.experts\.gate_up_proj",
        (r"model.layers.\1.mlp.gate_proj", r"model.layers.\1.mlp.up_proj"),
        JOINED,
    ),
    Rule(LAYER + r"mlp\.experts\.down_proj", r"model.layers.\1.mlp.down_proj", TRANSPOSED),
)

RULES = (
    *llama.RULES,
    *STACKED_EXPERTS,
    *(
        Rule(BLOCK + rf"experts\.(\d+)\.{name}\.weight", rf"model.layers.\1.mlp.{ours}[\2]", TRANSPOSED)
        for name, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    ),
)
