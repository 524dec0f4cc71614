"""Names in checkpoints of GPT-2, whose linear weights are [in, out]; files of `GPT2Model` lack "transformer."."""

from ..layouts import JOINED_UNTRANSPOSED
from ..rules import Rule
from .llama import HEAD

_PREFIX = r"(?:transformer\.)?"
_LAYER = _PREFIX + r"h\.(\d+)\."


def _linear(name: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(rf"{_LAYER}{name}\.weight", rf"model.layers.\1.{target}.kernel"),
        Rule(rf"{_LAYER}{name}\.bias", rf"model.layers.\1.{target}.bias"),
    )


def _norm(name: str, target: str) -> tuple[Rule, Rule]:
    return Rule(rf"{name}\.weight", f"{target}.scale"), Rule(rf"{name}\.bias", f"{target}.bias")


def _fused(kind: str) -> tuple[str, ...]:
    return tuple(rf"model.layers.\1.self_attn.{part}_proj.{kind}" for part in "qkv")


RULES = (
    Rule(_PREFIX + r"wte\.weight", "model.embed_tokens.embedding"),
    Rule(_PREFIX + r"wpe\.weight", "model.embed_positions.embedding"),
    Rule(_LAYER + r"attn\.c_attn\.weight", _fused("kernel"), JOINED_UNTRANSPOSED),
    Rule(_LAYER + r"attn\.c_attn\.bias", _fused("bias"), JOINED_UNTRANSPOSED),
    *_linear(r"attn\.c_proj", "self_attn.o_proj"),
    *_linear(r"mlp\.c_fc", "mlp.up_proj"),
    *_linear(r"mlp\.c_proj", "mlp.down_proj"),
    *_norm(_LAYER + "ln_1", r"model.layers.\1.input_layernorm"),
    *_norm(_LAYER + "ln_2", r"model.layers.\1.post_attention_layernorm"),
    *_norm(_PREFIX + "ln_f", "model.norm"),
    HEAD,
    # The causal mask and its value, which older versions of transformers stored.
    Rule(_LAYER + r"attn\.(?:masked_)?bias", None),
)
