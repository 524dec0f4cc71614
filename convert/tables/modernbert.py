"""Names in ModernBERT checkpoints."""

from ..layouts import JOINED
from ..rules import Rule
from .bert import CLASSIFIER, linear, norm, output_layer

PREFIX = r"(?:model\.)?"
LAYER = PREFIX + r"layers\.(\d+)\."
QKV = tuple(rf"layers.\1.self_attn.{name}_proj" for name in "qkv")
# The first half goes through the activation.
GATE_UP = (r"layers.\1.mlp.gate_proj", r"layers.\1.mlp.up_proj")


def joined(pattern: str, targets: tuple[str, ...]) -> tuple[Rule, Rule]:
    """Weight and bias of a torch `Linear` that is several of ours."""
    return (
        Rule(rf"{pattern}\.weight", tuple(f"{target}.kernel" for target in targets), JOINED),
        Rule(rf"{pattern}\.bias", tuple(f"{target}.bias" for target in targets), JOINED),
    )


RULES = (
    Rule(PREFIX + r"embeddings\.tok_embeddings\.weight", "embeddings.word_embeddings.embedding"),
    *norm(PREFIX + r"embeddings\.norm", "embeddings.norm"),
    *norm(LAYER + r"attn_norm", r"layers.\1.input_layernorm"),
    *joined(LAYER + r"attn\.Wqkv", QKV),
    *linear(LAYER + r"attn\.Wo", r"layers.\1.self_attn.o_proj"),
    *norm(LAYER + r"mlp_norm", r"layers.\1.post_attention_layernorm"),
    *joined(LAYER + r"mlp\.Wi", GATE_UP),
    *linear(LAYER + r"mlp\.Wo", r"layers.\1.mlp.down_proj"),
    *norm(PREFIX + r"final_norm", "norm"),
)
TRANSFORM = (*linear(r"head\.dense", "head.dense"), *norm(r"head\.norm", "head.norm"))
HEADS = {
    "masked_lm": (*TRANSFORM, *output_layer("decoder")),
    "sequence_classification": (*TRANSFORM, *CLASSIFIER),
    "token_classification": (*TRANSFORM, *CLASSIFIER),
    "question_answering": (*TRANSFORM, *CLASSIFIER),
}
