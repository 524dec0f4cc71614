"""Names in BERT checkpoints."""

from ..layouts import TRANSPOSED
from ..rules import Rule

BERT = r"(?:bert\.)?"
LAYER = BERT + r"encoder\.layer\.(\d+)\."
# TensorFlow's names of a norm's parameters are still met in old checkpoints.
SCALE, SHIFT = r"\.(?:weight|gamma)", r"\.(?:bias|beta)"


def linear(pattern: str, target: str, *, optional: bool = False) -> tuple[Rule, Rule]:
    """Weight and bias of a torch `Linear`."""
    return (
        Rule(rf"{pattern}\.weight", f"{target}.kernel", TRANSPOSED, optional=optional),
        Rule(rf"{pattern}\.bias", f"{target}.bias", optional=optional),
    )


def norm(pattern: str, target: str) -> tuple[Rule, Rule]:
    """Weight and bias of a torch `LayerNorm`."""
    return Rule(pattern + SCALE, f"{target}.scale"), Rule(pattern + SHIFT, f"{target}.bias")


RULES = (
    Rule(BERT + r"embeddings\.(word|position|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.embedding"),
    *norm(BERT + r"embeddings\.LayerNorm", "embeddings.norm"),
    *linear(LAYER + r"attention\.self\.query", r"layers.\1.self_attn.q_proj"),
    *linear(LAYER + r"attention\.self\.key", r"layers.\1.self_attn.k_proj"),
    *linear(LAYER + r"attention\.self\.value", r"layers.\1.self_attn.v_proj"),
    *linear(LAYER + r"attention\.output\.dense", r"layers.\1.self_attn.o_proj"),
    *norm(LAYER + r"attention\.output\.LayerNorm", r"layers.\1.attention_norm"),
    *linear(LAYER + r"intermediate\.dense", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"output\.dense", r"layers.\1.mlp.down_proj"),
    *norm(LAYER + r"output\.LayerNorm", r"layers.\1.output_norm"),
    *linear(BERT + r"pooler\.dense", "pooler.dense", optional=True),
    *linear(r"cls\.predictions\.transform\.dense", "head.dense"),
    *norm(r"cls\.predictions\.transform\.LayerNorm", "head.norm"),
    Rule(r"cls\.predictions\.bias", "head.bias"),
    Rule(r"cls\.predictions\.decoder\.weight", "head.out.kernel", TRANSPOSED, "embeddings.word_embeddings.embedding"),
    Rule(r"cls\.predictions\.decoder\.bias", "head.out.bias", tied_to="head.bias"),
    *linear(r"(?:classifier|qa_outputs)", "head.out"),
    # Constants, and the head of next-sentence prediction, which pre-training leaves behind.
    Rule(BERT + r"embeddings\.position_ids", None),
    Rule(r"cls\.seq_relationship\.(?:weight|bias)", None),
)
