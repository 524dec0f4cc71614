"""Names in Whisper checkpoints: of the encoder, by itself or with a decoder, which is left out."""

from ..layouts import OUTPUT_FIRST
from ..rules import Rule
from .bert import linear, norm

ENCODER = r"(?:model\.)?(?:encoder\.)?"
LAYER = ENCODER + r"layers\.(\d+)\."

RULES = (
    Rule(ENCODER + r"(conv[12])\.weight", r"embeddings.\1.kernel", OUTPUT_FIRST),
    Rule(ENCODER + r"(conv[12])\.bias", r"embeddings.\1.bias"),
    Rule(ENCODER + r"embed_positions\.weight", "embeddings.position_embeddings.embedding"),
    *norm(LAYER + r"self_attn_layer_norm", r"layers.\1.input_layernorm"),
    *linear(LAYER + r"self_attn\.([qkv])_proj", r"layers.\1.self_attn.\2_proj"),
    *linear(LAYER + r"self_attn\.out_proj", r"layers.\1.self_attn.o_proj"),
    *norm(LAYER + r"final_layer_norm", r"layers.\1.post_attention_layernorm"),
    *linear(LAYER + r"fc1", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"fc2", r"layers.\1.mlp.down_proj"),
    *norm(ENCODER + r"layer_norm", "norm"),
    Rule(r"(?:model\.)?decoder\..*|proj_out\.weight", None),
)
# Of a classifier of sound.
SPARE = (r"(?:projector|classifier)\.(?:weight|bias)", "layer_weights")
