"""Names in Nomic-BERT checkpoints: those of transformers, and those of the model's authors."""

from ..layouts import JOINED
from ..rules import Rule
from . import bert
from .bert import CLASSIFIER, QUESTION_ANSWERING, linear, norm, shared_output_layer

PREFIX = r"(?:(?:nomic_)?bert\.)?"
LAYER = PREFIX + r"(?:encoder\.)?layers\.(\d+)\."
QKV = tuple(rf"layers.\1.self_attn.{name}_proj.kernel" for name in "qkv")

RULES = (
    Rule(PREFIX + r"embeddings\.(word|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.embedding"),
    *norm(PREFIX + r"(?:embeddings\.LayerNorm|emb_ln)", "embeddings.norm"),
    *linear(LAYER + r"self_attn\.([qkvo])_proj", r"layers.\1.self_attn.\2_proj"),
    Rule(LAYER + r"attn\.Wqkv\.weight", QKV, JOINED),
    *linear(LAYER + r"attn\.out_proj", r"layers.\1.self_attn.o_proj"),
    *norm(LAYER + r"(?:post_attention_layernorm|norm1)", r"layers.\1.attention_norm"),
    *linear(LAYER + r"mlp\.(gate|up|down)_proj", r"layers.\1.mlp.\2_proj"),
    *linear(LAYER + r"mlp\.fc11", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"mlp\.fc12", r"layers.\1.mlp.gate_proj"),
    *linear(LAYER + r"mlp\.fc2", r"layers.\1.mlp.down_proj"),
    *norm(LAYER + r"(?:post_mlp_layernorm|norm2)", r"layers.\1.output_norm"),
    *linear(PREFIX + r"pooler\.dense", "pooler.dense", spare=True),
    # Constants.
    Rule(LAYER + r"attn\.rotary_emb\.inv_freq", None),
    Rule(PREFIX + r"embeddings\.position_ids", None),
)
HEADS = {
    "masked_lm": (
        *linear(r"cls\.predictions\.transform\.dense", "head.dense"),
        *norm(r"cls\.predictions\.transform\.layer_norm", "head.norm"),
        *shared_output_layer(r"cls\.predictions\.decoder", r"cls\.predictions\.bias"),
    ),
    "sequence_classification": CLASSIFIER,
    "token_classification": CLASSIFIER,
    "question_answering": QUESTION_ANSWERING,
}
SPARE = bert.SPARE
