"""Names in BERT checkpoints, and what checkpoints of its relatives share with them."""

from ..layouts import TRANSPOSED
from ..rules import Rule

# TensorFlow's names of a norm's parameters are still met in old checkpoints.
SCALE, SHIFT = r"\.(?:weight|gamma)", r"\.(?:bias|beta)"


def linear(pattern: str, target: str, *, spare: bool = False) -> tuple[Rule, Rule]:
    """Weight and bias of a torch `Linear`."""
    return (
        Rule(rf"{pattern}\.weight", f"{target}.kernel", TRANSPOSED, spare=spare),
        Rule(rf"{pattern}\.bias", f"{target}.bias", spare=spare),
    )


def norm(pattern: str, target: str) -> tuple[Rule, Rule]:
    """Weight and bias of a torch `LayerNorm`."""
    return Rule(pattern + SCALE, f"{target}.scale"), Rule(pattern + SHIFT, f"{target}.bias")


def output_layer(pattern: str) -> tuple[Rule, Rule, Rule]:
    """The output layer of a masked language model, whose weight may be that of the word embeddings."""
    return (
        Rule(rf"{pattern}\.weight", "head.out.kernel", TRANSPOSED, "embeddings.word_embeddings.embedding"),
        Rule(rf"{pattern}\.bias", "head.out.bias"),
        Rule(rf"{pattern}\.bias", "head.bias"),
    )


def shared_output_layer(pattern: str, bias: str) -> tuple[Rule, Rule, Rule]:
    """The same where the bias has a second name, by which it goes alone if the output layer is tied."""
    return (
        Rule(rf"{pattern}\.weight", "head.out.kernel", TRANSPOSED, "embeddings.word_embeddings.embedding"),
        Rule(rf"{pattern}\.bias", "head.out.bias", tied_to="head.bias"),
        Rule(bias, "head.bias", optional=True),
    )


def body(prefix: str) -> tuple[Rule, ...]:
    """Embeddings, layers and pooler, behind a prefix."""
    layer = prefix + r"encoder\.layer\.(\d+)\."
    return (
        Rule(
            prefix + r"embeddings\.(word|position|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.embedding"
        ),
        *norm(prefix + r"embeddings\.LayerNorm", "embeddings.norm"),
        *linear(layer + r"attention\.self\.query", r"layers.\1.self_attn.q_proj"),
        *linear(layer + r"attention\.self\.key", r"layers.\1.self_attn.k_proj"),
        *linear(layer + r"attention\.self\.value", r"layers.\1.self_attn.v_proj"),
        *linear(layer + r"attention\.output\.dense", r"layers.\1.self_attn.o_proj"),
        *norm(layer + r"attention\.output\.LayerNorm", r"layers.\1.attention_norm"),
        *linear(layer + r"intermediate\.dense", r"layers.\1.mlp.up_proj"),
        *linear(layer + r"output\.dense", r"layers.\1.mlp.down_proj"),
        *norm(layer + r"output\.LayerNorm", r"layers.\1.output_norm"),
        *linear(prefix + r"pooler\.dense", "pooler.dense", spare=True),
        # A constant.
        Rule(prefix + r"embeddings\.position_ids", None),
    )


CLASSIFIER = linear("classifier", "head.out")
QUESTION_ANSWERING = linear("qa_outputs", "head.out")

RULES = body(r"(?:bert\.)?")
HEADS = {
    "masked_lm": (
        *linear(r"cls\.predictions\.transform\.dense", "head.dense"),
        *norm(r"cls\.predictions\.transform\.LayerNorm", "head.norm"),
        *shared_output_layer(r"cls\.predictions\.decoder", r"cls\.predictions\.bias"),
    ),
    "sequence_classification": CLASSIFIER,
    "token_classification": CLASSIFIER,
    "question_answering": QUESTION_ANSWERING,
}
# The head of next-sentence prediction.
SPARE = (r"cls\.seq_relationship\.(?:weight|bias)",)
