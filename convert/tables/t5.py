"""Names in checkpoints of T5, mT5 and umT5: of the encoder, by itself or with a decoder, which is left out."""

from ..layouts import TRANSPOSED
from ..rules import Rule

BLOCK = r"encoder\.block\.(\d+)\."
MLP = r"layer\.1\.DenseReluDense\."
EMBEDDING = "embeddings.word_embeddings.embedding"

RULES = (
    Rule(r"shared\.weight", EMBEDDING),
    # The same table under the names of its users, of which a checkpoint may have any.
    Rule(r"(?:en|de)coder\.embed_tokens\.weight", EMBEDDING, copy=True),
    Rule(BLOCK + r"layer\.0\.layer_norm\.weight", r"layers.\1.input_layernorm.scale"),
    Rule(BLOCK + r"layer\.0\.SelfAttention\.([qkvo])\.weight", r"layers.\1.self_attn.\2_proj.kernel", TRANSPOSED),
    Rule(
        BLOCK + r"layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"layers.\1.self_attn.relative_bias.buckets.embedding",
    ),
    Rule(BLOCK + r"layer\.1\.layer_norm\.weight", r"layers.\1.post_attention_layernorm.scale"),
    Rule(BLOCK + MLP + r"wi_0\.weight", r"layers.\1.mlp.gate_proj.kernel", TRANSPOSED),
    Rule(BLOCK + MLP + r"wi(?:_1)?\.weight", r"layers.\1.mlp.up_proj.kernel", TRANSPOSED),
    Rule(BLOCK + MLP + r"wo\.weight", r"layers.\1.mlp.down_proj.kernel", TRANSPOSED),
    Rule(r"encoder\.final_layer_norm\.weight", "norm.scale"),
    Rule(r"decoder\..*|lm_head\.weight", None),
)
# Of classifiers that read the decoder or the encoder.
SPARE = (r"(?:classification_head\.(?:dense|out_proj)|classifier|qa_outputs)\.(?:weight|bias)",)
