"""Names in ViT checkpoints: those of the hub, and those of transformers' modules since 5."""

from ..layouts import OUTPUT_FIRST
from ..rules import Rule
from .bert import CLASSIFIER, linear, norm


def embeddings(prefix: str) -> tuple[Rule, ...]:
    """Patches, tokens and positions; the mask token is for pre-training only."""
    return (
        Rule(
            prefix + r"embeddings\.patch_embeddings\.projection\.weight", "embeddings.projection.kernel", OUTPUT_FIRST
        ),
        Rule(prefix + r"embeddings\.patch_embeddings\.projection\.bias", "embeddings.projection.bias"),
        Rule(prefix + r"embeddings\.(cls_token|register_tokens|position_embeddings)", r"embeddings.\1"),
        Rule(prefix + r"embeddings\.mask_token", None),
    )


def attention(layer: str) -> tuple[Rule, ...]:
    """The attention of the layers whose names begin so."""
    return (
        *linear(layer + r"attention\.(?:attention\.query|q_proj)", r"layers.\1.self_attn.q_proj"),
        *linear(layer + r"attention\.(?:attention\.key|k_proj)", r"layers.\1.self_attn.k_proj"),
        *linear(layer + r"attention\.(?:attention\.value|v_proj)", r"layers.\1.self_attn.v_proj"),
        *linear(layer + r"attention\.(?:output\.dense|o_proj)", r"layers.\1.self_attn.o_proj"),
    )


VIT = r"(?:vit\.)?"
LAYER = VIT + r"(?:encoder\.layer|layers)\.(\d+)\."
RULES = (
    *embeddings(VIT),
    *norm(LAYER + r"layernorm_before", r"layers.\1.input_layernorm"),
    *attention(LAYER),
    *norm(LAYER + r"layernorm_after", r"layers.\1.post_attention_layernorm"),
    *linear(LAYER + r"(?:intermediate\.dense|mlp\.fc1)", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"(?:output\.dense|mlp\.fc2)", r"layers.\1.mlp.down_proj"),
    *norm(VIT + r"layernorm", "norm"),
    *linear(VIT + r"pooler\.dense", "pooler.dense", spare=True),
)
HEADS = {"sequence_classification": CLASSIFIER}
# The head of masked image modelling.
SPARE = (r"decoder\.0\.(?:weight|bias)",)
