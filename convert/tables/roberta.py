"""Names in RoBERTa and XLM-RoBERTa checkpoints."""

from .bert import CLASSIFIER, QUESTION_ANSWERING, body, linear, norm, shared_output_layer

RULES = body(r"(?:roberta\.)?")
HEADS = {
    "masked_lm": (
        *linear(r"lm_head\.dense", "head.dense"),
        *norm(r"lm_head\.layer_norm", "head.norm"),
        *shared_output_layer(r"lm_head\.decoder", r"lm_head\.bias"),
    ),
    "sequence_classification": (
        *linear(r"classifier\.dense", "head.dense"),
        *linear(r"classifier\.out_proj", "head.out"),
    ),
    "token_classification": CLASSIFIER,
    "question_answering": QUESTION_ANSWERING,
}
