"""Names in checkpoints of the Llama family, which our tree of parameters follows."""

from ..layouts import TRANSPOSED
from ..rules import Rule

# A bare LlamaModel has no prefix; "transformer." is that of models which answer questions.
PREFIX = r"(?:(?:model|transformer)\.)?"
LAYER = PREFIX + r"layers\.(\d+)\."

HEAD = Rule(r"lm_head\.weight", "lm_head.kernel", TRANSPOSED, tied_to="model.embed_tokens.embedding")
EMBEDDING = Rule(PREFIX + r"embed_tokens\.weight", "model.embed_tokens.embedding")
NORM = Rule(PREFIX + r"norm\.weight", "model.norm.scale")
# Constants that transformers stored until 4.31; they follow from the config.
FREQUENCIES = Rule(PREFIX + r"(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", None)


def linear(names: str) -> tuple[Rule, Rule]:
    """Weights and biases of layers' linear modules that are named as ours; `names` is a regular expression."""
    return (
        Rule(rf"{LAYER}({names})\.weight", r"model.layers.\1.\2.kernel", TRANSPOSED),
        Rule(rf"{LAYER}({names})\.bias", r"model.layers.\1.\2.bias"),
    )


def norms(names: str) -> Rule:
    """Weights of layers' norms that are named as ours; `names` is a regular expression."""
    return Rule(rf"{LAYER}({names})\.weight", r"model.layers.\1.\2.scale")


RULES = (
    EMBEDDING,
    *linear(r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"),
    norms("input_layernorm|post_attention_layernorm"),
    NORM,
    HEAD,
    FREQUENCIES,
)
