"""Names in RoBERTa and XLM-RoBERTa checkpoints."""

from .bert import body, linear, norm, shared_output_layer

RULES = (
    *body(r"(?:roberta\.)?"),
    *linear(r"(?:lm_head|classifier)\.dense", "head.dense"),
    *norm(r"lm_head\.layer_norm", "head.norm"),
    *shared_output_layer(r"lm_head\.decoder", r"lm_head\.bias"),
    *linear(r"(?:classifier\.out_proj|classifier|qa_outputs)", "head.out"),
)
