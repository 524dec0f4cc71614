"""Names in DistilBERT checkpoints."""

from ..rules import Rule
from .bert import CLASSIFIER, QUESTION_ANSWERING, linear, norm, output_layer

PREFIX = r"(?:distilbert\.)?"
LAYER = PREFIX + r"transformer\.layer\.(\d+)\."

RULES = (
    Rule(PREFIX + r"embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.embedding"),
    *norm(PREFIX + r"embeddings\.LayerNorm", "embeddings.norm"),
    *linear(LAYER + r"attention\.([qkv])_lin", r"layers.\1.self_attn.\2_proj"),
    *linear(LAYER + r"attention\.out_lin", r"layers.\1.self_attn.o_proj"),
    *norm(LAYER + r"sa_layer_norm", r"layers.\1.attention_norm"),
    *linear(LAYER + r"ffn\.lin1", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"ffn\.lin2", r"layers.\1.mlp.down_proj"),
    *norm(LAYER + r"output_layer_norm", r"layers.\1.output_norm"),
    # A constant.
    Rule(PREFIX + r"embeddings\.position_ids", None),
)
HEADS = {
    "masked_lm": (
        *linear("vocab_transform", "head.dense"),
        *norm("vocab_layer_norm", "head.norm"),
        *output_layer("vocab_projector"),
    ),
    "sequence_classification": (*linear("pre_classifier", "head.dense"), *CLASSIFIER),
    "token_classification": CLASSIFIER,
    "question_answering": QUESTION_ANSWERING,
}
