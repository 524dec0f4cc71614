"""Names in checkpoints of GPT-NeoX, where each head's query, key and value lie one behind the other."""

from ...model.decoder import DecoderConfig
from ..layouts import TRANSPOSED, JoinedByHead
from ..rules import Rule

_PREFIX = r"(?:gpt_neox\.)?"
_LAYER = _PREFIX + r"layers\.(\d+)\."


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The rules for a model with the configuration's number of heads."""
    joined = JoinedByHead(config.num_attention_heads)
    return (
        Rule(_PREFIX + r"embed_in\.weight", "model.embed_tokens.embedding"),
        Rule(_LAYER + r"attention\.query_key_value\.weight", _fused("kernel"), joined),
        Rule(_LAYER + r"attention\.query_key_value\.bias", _fused("bias"), joined),
        *_linear(r"attention\.dense", "self_attn.o_proj"),
        *_linear(r"mlp\.dense_h_to_4h", "mlp.up_proj"),
        *_linear(r"mlp\.dense_4h_to_h", "mlp.down_proj"),
        Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", r"model.layers.\1.\2.scale"),
        Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.bias", r"model.layers.\1.\2.bias"),
        Rule(_PREFIX + r"final_layer_norm\.weight", "model.norm.scale"),
        Rule(_PREFIX + r"final_layer_norm\.bias", "model.norm.bias"),
        Rule(
            r"(?:embed_out|lm_head)\.weight",
            "lm_head.kernel",
            TRANSPOSED,
            tied_to="model.embed_tokens.embedding",
        ),
        # The causal mask, its value and the rotary frequencies, which older versions of transformers stored.
        Rule(_LAYER + r"attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)", None),
    )


def _fused(kind: str) -> tuple[str, ...]:
    return tuple(rf"model.layers.\1.self_attn.{part}_proj.{kind}" for part in "qkv")


def _linear(name: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(rf"{_LAYER}{name}\.weight", rf"model.layers.\1.{target}.kernel", TRANSPOSED),
        Rule(rf"{_LAYER}{name}\.bias", rf"model.layers.\1.{target}.bias"),
    )
