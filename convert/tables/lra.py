"""Names in the PyTorch code for Long Range Arena that Nystromformer published and others took over."""

from ..rules import Rule
from .bert import linear, norm

PREFIX = r"(?:model\.)?"
HEAD = r"seq_classifer\.mlpblock\."  # spelled so


def layer(pattern: str, index: str) -> tuple[Rule, ...]:
    """The tensors of a layer; ours has the given index."""
    ours = rf"layers.{index}"
    return (
        *norm(pattern + r"norm1", f"{ours}.input_layernorm"),
        *(rule for name in "qkv" for rule in linear(rf"{pattern}mha\.W_{name}", f"{ours}.self_attn.{name}_proj")),
        *linear(pattern + r"mha\.ff", f"{ours}.self_attn.o_proj"),
        *norm(pattern + r"norm2", f"{ours}.post_attention_layernorm"),
        *linear(pattern + r"mlpblock\.0", f"{ours}.mlp.up_proj"),
        *linear(pattern + r"mlpblock\.3", f"{ours}.mlp.down_proj"),
    )


RULES = (
    Rule(PREFIX + r"embeddings\.word_embeddings\.weight", "embeddings.word_embeddings.embedding"),
    # The PyTorch code has the table even where its positions are sinusoids.
    Rule(
        PREFIX + r"embeddings\.position_embeddings\.weight", "embeddings.position_embeddings.embedding", optional=True
    ),
    *layer(PREFIX + r"transformer_(\d+)\.", r"\1"),
    *layer(PREFIX + r"transformer\.", "0"),
    *norm(PREFIX + r"norm", "norm"),
)
HEADS = {"sequence_classification": (*linear(HEAD + "0", "head.dense"), *linear(HEAD + "2", "head.out"))}
