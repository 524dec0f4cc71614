"""Layers, in the orders of norm, attention and MLP that architectures share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..attention.cache import LayerCache
from .self_attention import LayerCall, Norm, SelfAttention


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
