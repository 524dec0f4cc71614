"""Names in checkpoints of DINOv2, with and without registers: those of the hub, and of transformers' modules."""

from ..layouts import JOINED
from ..rules import Rule
from .bert import CLASSIFIER, linear, norm
from .vit import attention, embeddings

DINO = r"(?:dinov2(?:_with_registers)?\.)?"
LAYER = DINO + r"encoder\.layer\.(\d+)\."
GATE_AND_UP = (r"layers.\1.mlp.gate_proj", r"layers.\1.mlp.up_proj")

RULES = (
    *embeddings(DINO),
    *norm(LAYER + r"norm1", r"layers.\1.input_layernorm"),
    *attention(LAYER),
    Rule(LAYER + r"layer_scale1\.lambda1", r"layers.\1.attention_scale"),
    *norm(LAYER + r"norm2", r"layers.\1.post_attention_layernorm"),
    *linear(LAYER + r"mlp\.fc1", r"layers.\1.mlp.up_proj"),
    *linear(LAYER + r"mlp\.fc2", r"layers.\1.mlp.down_proj"),
    Rule(LAYER + r"mlp\.weights_in\.weight", tuple(f"{name}.kernel" for name in GATE_AND_UP), JOINED),
    Rule(LAYER + r"mlp\.weights_in\.bias", tuple(f"{name}.bias" for name in GATE_AND_UP), JOINED),
    *linear(LAYER + r"mlp\.(gate|up)_proj", r"layers.\1.mlp.\2_proj"),
    *linear(LAYER + r"mlp\.(?:weights_out|down_proj)", r"layers.\1.mlp.down_proj"),
    Rule(LAYER + r"layer_scale2\.lambda1", r"layers.\1.mlp_scale"),
    *norm(DINO + r"layernorm", "norm"),
)
HEADS = {"sequence_classification": CLASSIFIER}
