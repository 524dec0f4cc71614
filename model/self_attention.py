"""Self-attention as the architectures share it: projections, norms of queries and keys, rotary positions, KV cache."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..attention import Attention, Call, Constants, KeyView, LayerCache, Mask, Plan, Rows, attend_and_keep, extend
from .modules import Linear, project
from .rope import RotaryTables, apply_rotary

Norm = Callable[[Array], Array]
"""A norm over the last dimension: `RMSNorm` or `LayerNorm`."""
LayerConstants = tuple[Constants, ...]
"""What calibration learned, layer by layer; nothing of a layer that attends exactly."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "rotary", "cache", "table", "constants"),
    meta_fields=("plan", "decoding", "in_turn", "layer", "observe"),
)
@dataclass(frozen=True)
class LayerCall:
    """What a layer's attention is computed with in one call, besides its input. A pytree of its arrays.

    Attributes:
        rows: of the call.
        plan: the attention of the layers that see whole rows; those with a window attend exactly.
        decoding: whether the call decodes, and takes that attention of the plan.
        in_turn: whether rows of one token each may be consecutive tokens of one slot, the first first, none of which
            may see what a later one leaves.
        layer: number of the layer, from 0, or of one in which the plan amounts to the same.
        rotary: tables of this layer's rotary embedding, None for a layer without.
        cache: what earlier calls left of this layer, None to attend to this call's tokens only.
        table: the pages of each slot of the cache; None where a slot is one page.
        constants: what the attention was calibrated to in this layer.
        observe: is given queries and keys as attention takes them, while the function is traced.
    """

    rows: Rows
    plan: Plan
    decoding: bool = False
    in_turn: bool = False
    layer: int = 0
    rotary: RotaryTables | None = None
    cache: LayerCache | None = None
    table: Int[Array, "slots slot_pages"] | None = None
    constants: Constants = field(default_factory=dict)
    observe: Callable[[Array, Array], None] | None = None

    @property
    def attention(self) -> Attention:
        """The attention of this call in this layer."""
        return (self.plan.decode if self.decoding else self.plan.prompt).of_layer(self.layer)


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
        relative_bias: makes the logits' bias [query_heads, distances] as `Mask` has it, or None; layers
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
        relative_bias: nnx.Module | None = None,
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
        self.relative_bias: Any = relative_bias
        self.head_dim, self.causal = head_dim, config.causal
        self.scale, self.softcap, self.window = scale, softcap, window

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        """The attention's output, and the layer's cache with this call's keys and values if the call has one."""
        query, key, value = self._queries_keys_values(hidden, call.rotary)
        if call.observe is not None:
            call.observe(query, key)
        attend = self._attend_in_turn if call.in_turn and self._overwrites(call) else self._attend
        context, cache = attend(query, key, value, call)
        batch, tokens, _ = hidden.shape
        return self.o_proj(context.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)), cache

    def _attend(
        self,
        query: Float[Array, "batch heads tokens head_dim"],
        key: Float[Array, "batch kv_heads tokens head_dim"],
        value: Float[Array, "batch kv_heads tokens head_dim"],
        call: LayerCall,
    ) -> tuple[Float[Array, "batch heads tokens head_dim"], LayerCache | None]:
        """Attention to this call's keys and values and those in the cache, and the cache with both."""
        mask = Mask(
            self.causal,
            self.window,
            self.scale,
            self.softcap,
            None if self.relative_bias is None else self.relative_bias(),
        )
        keys, rows, cache, state = KeyView(key, value), call.rows, call.cache, {}
        if cache is not None:
            fields, entries = call.plan.fields(self.head_dim), partial(call.plan.entries, constants=call.constants)
            names = call.plan.state(call.layer, key.shape[1])
            cache, keys, rows, mask = extend(cache, key, value, rows, mask, fields, entries, call.table, names)
            state = {name: cache[name] for name in names if name in cache}
        context, state = attend_and_keep(call.attention, Call(query, keys, rows, mask, call.constants, state))
        return context, cache if cache is None else {**cache, **state}

    def _overwrites(self, call: LayerCall) -> bool:
        """Whether a token changes what those before it attend to: in a ring, in a selection that is kept, and in
        entries of the index that it shares with them. Elsewhere it only adds to what they do not see."""
        shared = any(kept.tokens > 1 for kept in call.plan.fields(self.head_dim).values())
        return self.window is not None or shared or bool(call.plan.state(call.layer, 1))

    def _attend_in_turn(
        self,
        query: Float[Array, "batch heads 1 head_dim"],
        key: Float[Array, "batch kv_heads 1 head_dim"],
        value: Float[Array, "batch kv_heads 1 head_dim"],
        call: LayerCall,
    ) -> tuple[Float[Array, "batch heads 1 head_dim"], LayerCache | None]:
        """The same, one row after the other."""

        def one(cache: LayerCache, row: tuple[Array, Array, Array, Rows]) -> tuple[LayerCache, Array]:
            query, key, value, rows = jax.tree.map(lambda x: x[None], row)
            context, cache_after = self._attend(query, key, value, replace(call, rows=rows, cache=cache))
            assert cache_after is not None
            return cache_after, context[0]

        assert call.cache is not None
        cache, context = lax.scan(one, dict(call.cache), (query, key, value, call.rows))
        return context, cache

    def _queries_keys_values(
        self, hidden: Float[Array, "batch tokens hidden_size"], rotary: RotaryTables | None
    ) -> tuple[
        Float[Array, "batch heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
    ]:
        """The three projections by head, queries and keys after norm and rotary embedding."""
        projected = (x.astype(hidden.dtype) for x in project(hidden, self.q_proj, self.k_proj, self.v_proj))
        norms = (self.q_norm, self.k_norm, None)
        query, key, value = (self._split_heads(x, norm) for x, norm in zip(projected, norms, strict=True))
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return query, key, value

    def _split_heads(
        self, x: Float[Array, "batch tokens features"], norm: Norm | None
    ) -> Float[Array, "batch heads tokens head_dim"]:
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None and self.norm_heads:
            x = norm(x)
        return x.transpose(0, 2, 1, 3)
