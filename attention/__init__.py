"""Attention as pure functions on arrays: exact, and two-stage with a top-k selection of the keys."""

from jaxtyping import Array, Float, Int, Int8

from .config import AttentionConfig, Auto, Dense, TwoStage, attention_to_dict, method_of
from .exact import exact_attention
from .methods import METHODS, LowRank, MeanPool, Method, make_method, project_keys
from .two_stage import two_stage_attention

__all__ = [
    "METHODS",
    "AttentionConfig",
    "Auto",
    "Dense",
    "LowRank",
    "MeanPool",
    "Method",
    "TwoStage",
    "attend",
    "attention_to_dict",
    "exact_attention",
    "make_method",
    "method_of",
    "project_keys",
    "two_stage_attention",
]


def attend(
    config: AttentionConfig,
    query: Float[Array, "batch query_heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys value_dim"],
    *,
    offset: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    basis: Float[Array, "kv_heads 2 head_dim rank"] | None = None,
    projected: Int8[Array, "batch kv_heads keys padded_rank"] | None = None,
) -> Float[Array, "batch query_heads queries value_dim"]:
    """The attention that a configuration asks for; arguments as in `exact_attention`.

    `basis` holds the projections of the query and of the key that the method of a `TwoStage` was calibrated to, and
    `projected` what `project_keys` made of the keys (made here if it is not given). A
    budget or a crossover that covers every key is exact attention, and is computed as such.
    """
    if isinstance(config, TwoStage) and config.exact_keys < key.shape[2]:
        return two_stage_attention(
            config,
            query,
            key,
            value,
            offset=offset,
            lengths=lengths,
            causal=causal,
            scale=scale,
            softcap=softcap,
            basis=basis,
            projected=projected,
        )
    dense = config if isinstance(config, Dense) else Dense()
    return exact_attention(
        query,
        key,
        value,
        offset=offset,
        lengths=lengths,
        causal=causal,
        scale=scale,
        softcap=softcap,
        query_block=dense.query_block,
        key_block=dense.key_block,
    )
