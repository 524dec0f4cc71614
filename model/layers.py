"""Layers, in the orders of norm, attention and MLP that architectures share, and the loop over them."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..attention import KVCache, LayerCache, heard, listening
from .rope import Rope, RotaryTables, rotary_tables
from .self_attention import LayerCall, LayerConstants, Norm, SelfAttention


class PreNormLayer(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual, times `residual_multiplier`.

    Without `norm_input` the attention takes the residual as it is.
    """

    def __init__(
        self,
        self_attn: SelfAttention,
        mlp: nnx.Module,
        make_norm: Callable[[], Any],
        residual_multiplier: float = 1.0,
        *,
        norm_input: bool = True,
    ) -> None:
        self.input_layernorm: Norm | None = make_norm() if norm_input else None
        self.self_attn = self_attn
        self.post_attention_layernorm: Norm = make_norm()
        self.mlp: Any = mlp
        self.residual_multiplier = residual_multiplier

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        normed = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        attended, cache = self.self_attn(normed, call)
        hidden = self._add(hidden, attended)
        return self._add(hidden, self.mlp(self.post_attention_layernorm(hidden))), cache

    def _add(
        self, residual: Float[Array, "batch tokens hidden_size"], update: Float[Array, "batch tokens hidden_size"]
    ) -> Float[Array, "batch tokens hidden_size"]:
        if self.residual_multiplier != 1:
            # Wide, so that the multiplier is not rounded to the activations' dtype.
            update = (update.astype(jnp.float32) * self.residual_multiplier).astype(update.dtype)
        return residual + update


class ParallelLayer(nnx.Module):
    """Attention and MLP side by side: both take the layer's input, normalised, and are added to it together.

    Each has a norm of its own, or both the first where they share one.
    """

    def __init__(
        self, self_attn: SelfAttention, mlp: nnx.Module, make_norm: Callable[[], Any], *, share_norm: bool
    ) -> None:
        self.input_layernorm: Norm = make_norm()
        self.self_attn = self_attn
        self.post_attention_layernorm: Norm | None = None if share_norm else make_norm()
        self.mlp: Any = mlp

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        normed = self.input_layernorm(hidden)
        attended, cache = self.self_attn(normed, call)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden)
        return hidden + attended + self.mlp(normed), cache


class PostNormLayer(nnx.Module):
    """Attention and MLP, each added to the residual and normalised after."""

    def __init__(self, self_attn: nnx.Module, mlp: nnx.Module, make_norm: Callable[[], Any]) -> None:
        self.self_attn: Any = self_attn
        self.attention_norm = make_norm()
        self.mlp: Any = mlp
        self.output_norm = make_norm()

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], call: LayerCall
    ) -> tuple[Float[Array, "batch tokens hidden_size"], None]:
        attended, _ = self.self_attn(hidden, call)
        hidden = self.attention_norm(hidden + attended)
        return self.output_norm(hidden + self.mlp(hidden)), None


@runtime_checkable
class LayerSettings(Protocol):
    """What the loop over layers takes from a model's configuration."""

    @property
    def head_dim(self) -> int: ...

    @property
    def ropes(self) -> tuple[Rope | None, ...]: ...


def run_layers(
    layers: Iterable[Any],
    hidden: Float[Array, "rows tokens hidden_size"],
    call: LayerCall,
    config: LayerSettings,
    positions: Int[Array, "rows tokens"],
    *,
    cache: KVCache | None = None,
    constants: LayerConstants | None = None,
) -> tuple[Float[Array, "rows tokens hidden_size"], KVCache | None]:
    """All layers in turn, each with its rotary embedding, its part of the cache and its constants.

    Returns:
        The last layer's output, and the cache with this call's keys and values; None if there is none.
    """
    caches: list[LayerCache] = []
    # Outside of a trace, jit would compile; who looks on wants values of the trace that they are called in.
    looked_at = call.observe is not None or not all(strategy.pure for strategy in call.plan.strategies)
    run = _run if looked_at or not isinstance(hidden, jax.core.Tracer) else _traced_once()
    for index, (layer, layer_call) in enumerate(zip(layers, layer_calls(call, config, positions), strict=True)):
        layer_call = replace(
            layer_call,
            cache=None if cache is None else cache[index],
            constants={} if constants is None else constants[index],
        )
        hidden, layer_cache = run(layer, hidden, layer_call)
        if layer_cache is not None:
            caches.append(layer_cache)
    return hidden, None if cache is None else tuple(caches)


def layer_calls(call: LayerCall, config: LayerSettings, positions: Int[Array, "rows tokens"]) -> list[LayerCall]:
    """Each layer's part of a call, with its number and rotary embedding; without a cache and constants."""
    # Layers with the same rotary embedding share its tables.
    tables: dict[Rope | None, RotaryTables | None] = {
        rope: None if rope is None else rotary_tables(rope, config.head_dim, positions, call.rows.length)
        for rope in dict.fromkeys(config.ropes)
    }
    return [
        replace(call, layer=call.plan.first_like(index), rotary=tables[rope]) for index, rope in enumerate(config.ropes)
    ]


RunLayer = Callable[[nnx.Module, Float[Array, "rows tokens hidden_size"], LayerCall], Any]


def _run(layer: Any, hidden: Float[Array, "rows tokens hidden_size"], call: LayerCall) -> Any:
    return layer(hidden, call)


def _traced_once() -> RunLayer:
    """Calls layers, and traces those that are alike but for the values of their parameters only once."""
    calls: dict[Hashable, Counter[str]] = {}

    @partial(jax.jit, static_argnums=0, inline=True)
    def traced(graph: Any, state: Any, hidden: Array, call: LayerCall) -> Any:
        return nnx.merge(graph, state)(hidden, call)

    def run(layer: nnx.Module, hidden: Float[Array, "rows tokens hidden_size"], call: LayerCall) -> Any:
        graph, state = nnx.split(layer)
        with listening() as new:
            result = traced(graph, state, hidden, call)
        leaves, tree = jax.tree.flatten((state, hidden, call))
        key = graph, tree, tuple((x.shape, x.dtype) for x in leaves)
        heard(calls.setdefault(key, new))
        return result

    return run
