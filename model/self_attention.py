"""Self-attention as the architectures share it: projections, norms of queries and keys, rotary positions, KV cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..attention import AttentionConfig, attend
from ..attention.cache import LayerCache, write
from .layers import Linear
from .rope import RotaryTables, apply_rotary

Norm = Callable[[Array], Array]
"""A norm over the last dimension: `RMSNorm` or `LayerNorm`."""
Bases = tuple[Array | None, ...]
"""What the attention's stage-1 method needs, one array per layer; None for a layer that attends exactly."""


@dataclass(frozen=True)
class LayerCall:
    """What a layer's attention is computed with in one call, besides its input.

    Attributes:
        offset: int32 [batch], position of each row's first token in this call.
        lengths: int32 [batch], tokens of each whole row.
        attention: of the layers that see the whole row; those with a window attend exactly.
        rotary: tables of this layer's rotary embedding, None for a layer without.
        cache: what earlier calls left of this layer, None to attend to this call's tokens only.
        basis: what the attention's stage-1 method was calibrated to in this layer, if it needs that.
        observe: is given queries and keys as attention takes them, while the function is traced.
    """

    offset: Int[Array, " batch"]
    lengths: Int[Array, " batch"]
    attention: AttentionConfig
    rotary: RotaryTables | None = None
    cache: LayerCache | None = None
    basis: Array | None = None
    observe: Callable[[Array, Array], None] | None = None


@runtime_checkable
class AttentionSizes(Protocol):
    """What attention takes from a model's configuration, a `DecoderConfig` or an `EncoderConfig`."""

    @property
    def causal(self) -> bool: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class SelfAttention(nnx.Module):
    """Multi-head self-attention with grouped key and value heads, of the sizes that a model's configuration has.

    Attributes:
        q_norm, k_norm: norms of queries and keys before the rotary embedding, or None.
        norm_heads: whether those norm each head by itself; else all heads of a token together.
        scale: factor of the logits, None for 1 / sqrt(head_dim).
        softcap: cap of the logits, or None.
        window: keys that a query sees counted back from itself, its own included (to both sides where not causal), or
            None for all. A layer with a window attends exactly.
        causal: whether a query sees only keys up to its own position.
        distance_bias: makes the logits' bias [query_heads, distances] as `exact_attention` takes it, or None; layers
            may share one.
    """

    def __init__(
        self,
        config: AttentionSizes,
        *,
        use_bias: bool = False,
        use_output_bias: bool | None = None,
        use_key_bias: bool | None = None,
        q_norm: nnx.Module | None = None,
        k_norm: nnx.Module | None = None,
        norm_heads: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        distance_bias: nnx.Module | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        hidden_size, head_dim = config.hidden_size, config.head_dim
        query_features, key_features = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = linear(hidden_size, query_features, use_bias=use_bias)
        self.k_proj = linear(hidden_size, key_features, use_bias=use_bias if use_key_bias is None else use_key_bias)
        self.v_proj = linear(hidden_size, key_features, use_bias=use_bias)
        self.o_proj = linear(
            query_features, hidden_size, use_bias=use_bias if use_output_bias is None else use_output_bias
        )
        self.q_norm, self.k_norm, self.norm_heads = q_norm, k_norm, norm_heads
        self.distance_bias: Any = distance_bias
        self.head_dim, self.causal = head_dim, config.causal
        self.scale, self.softcap, self.window = scale, softcap, window

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        """The attention's output, and the layer's cache with this call's keys and values if the call has one."""
        query, key, value = self._queries_keys_values(hidden, call.rotary)
        if call.observe is not None:
            call.observe(query, key)
        cache, projected = call.cache, None
        if cache is not None:
            cache = write(cache, key, value, call.offset, call.basis)
            key, value, projected = cache
        context = attend(
            call.attention,
            query,
            key,
            value,
            offset=call.offset,
            lengths=call.lengths,
            causal=self.causal,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            distance_bias=None if self.distance_bias is None else self.distance_bias(),
            basis=call.basis,
            projected=projected,
        )
        batch, tokens, _ = hidden.shape
        return self.o_proj(context.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)), cache

    def _queries_keys_values(
        self, hidden: Float[Array, "batch tokens hidden_size"], rotary: RotaryTables | None
    ) -> tuple[
        Float[Array, "batch heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
    ]:
        """The three projections by head, queries and keys after norm and rotary embedding."""
        query = self._split_heads(self.q_proj(hidden), self.q_norm)
        key = self._split_heads(self.k_proj(hidden), self.k_norm)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return query, key, self._split_heads(self.v_proj(hidden), None)

    def _split_heads(
        self, x: Float[Array, "batch tokens features"], norm: Norm | None
    ) -> Float[Array, "batch heads tokens head_dim"]:
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None and self.norm_heads:
            x = norm(x)
        return x.transpose(0, 2, 1, 3)
