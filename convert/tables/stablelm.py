"""Names in checkpoints of StableLM: those of Llama, with biases of norms, and a norm for every head."""

from ..rules import Rule
from .llama import LAYER, PREFIX
from .llama import RULES as LLAMA

RULES = (
    *LLAMA,
    Rule(LAYER + r"(input_layernorm|post_attention_layernorm)\.bias", r"model.layers.\1.\2.bias"),
    Rule(PREFIX + r"norm\.bias", "model.norm.bias"),
    Rule(LAYER + r"self_attn\.([qk])_layernorm\.norms\.(\d+)\.weight", r"model.layers.\1.self_attn.\2_norm.scale[\3]"),
)
