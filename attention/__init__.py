"""Attention as pure functions on arrays: exact, and two-stage with a top-k selection of the keys."""

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int, Int8

from .config import AttentionConfig, Auto, Dense, TwoStage, attention_to_dict, method_of
from .exact import exact_attention
from .methods import METHODS, LowRank, MeanPool, Method, make_method, project_keys
from .two_stage import any_selected, runs_in_kernel, two_stage_attention

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
    window: int | None = None,
    distance_bias: Float[Array, "query_heads distances"] | None = None,
    basis: Float[Array, "kv_heads 2 head_dim rank"] | None = None,
    projected: Int8[Array, "batch kv_heads keys padded_rank"] | None = None,
) -> Float[Array, "batch query_heads queries value_dim"]:
    """The attention that a configuration asks for; arguments as in `exact_attention`.

    `basis` holds the projections of the query and of the key that the method of a `TwoStage` was calibrated to, and
    `projected` what `project_keys` made of the keys (made here if it is not given). A budget or a crossover that
    covers every key is exact attention, and is computed as such. With a `window` attention is exact within the window,
    whatever `config` says: two-stage attention is for layers that see the whole sequence. The native kernels have no
    `distance_bias`: with one, everything runs in XLA.
    """
    options: dict[str, Any] = {
        "offset": offset,
        "lengths": lengths,
        "causal": causal,
        "scale": scale,
        "softcap": softcap,
        "distance_bias": distance_bias,
    }
    dense = config if isinstance(config, Dense) else Dense()

    def exact() -> Array:
        blocks = {"query_block": dense.query_block, "key_block": dense.key_block}
        return exact_attention(query, key, value, window=window, **blocks, **options)

    def two_stage(config: TwoStage) -> Array:
        return two_stage_attention(config, query, key, value, basis=basis, projected=projected, **options)

    if window is not None or isinstance(config, Dense) or key.shape[2] <= config.exact_keys:
        return exact()
    if distance_bias is None and runs_in_kernel(config, query, key, value):
        return two_stage(config)
    # In XLA, a call whose query blocks all attend exactly, as in short prompts, pays for no summary of the keys and has
    # the larger query blocks of exact attention.
    some = any_selected(config, query.shape[2], offset, lengths, causal)
    return lax.cond(some, lambda: two_stage(config), exact)
