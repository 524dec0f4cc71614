"""Names in checkpoints of Phi-3 and Phi-4: those of Llama, with fused projections."""

from ..layouts import JOINED
from ..rules import Rule
from .llama import EMBEDDING, HEAD, LAYER, NORM, linear, norms

RULES = (
    EMBEDDING,
    Rule(
        LAYER + r"self_attn\.qkv_proj\.weight",
        tuple(rf"model.layers.\1.self_attn.{name}_proj.kernel" for name in "qkv"),
        JOINED,
    ),
    Rule(
        LAYER + r"mlp\.gate_up_proj\.weight",
        tuple(rf"model.layers.\1.mlp.{name}_proj.kernel" for name in ("gate", "up")),
        JOINED,
    ),
    *linear(r"self_attn\.o_proj|mlp\.down_proj"),
    norms("input_layernorm|post_attention_layernorm"),
    NORM,
    HEAD,
)
