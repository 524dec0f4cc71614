"""The Llama family: configuration and NNX modules, with the checkpoint's names and the attention to use as an argument.

Source: transformers' `modeling_llama.py`, whose logits these equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from ..attention import AttentionConfig, Dense, attend
from ..attention.cache import KVCache, LayerCache, write
from .config import read_boolean, read_choice, read_integer, read_number, require
from .layers import ACTIVATIONS, Embedding, GatedMLP, Linear, RMSNorm
from .rope import Rope, RotaryTables, apply_rotary, rope_from_config, rotary_tables

Bases = tuple[Array, ...]
"""What the attention's stage-1 method needs, one array per layer."""


@dataclass(frozen=True)
class LlamaConfig:
    """Configuration of a Llama model; fields are named as in the Hugging Face config."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config, with transformers' defaults for the fields that it lacks.

        Raises:
            ValueError: a field out of range, or one that asks for mathematics that this model does not have.
        """
        require(config, "sliding_window", None)
        num_hidden_layers = read_integer(config, "num_hidden_layers", 32)
        require(config, "layer_types", ["full_attention"] * num_hidden_layers)
        hidden_size = read_integer(config, "hidden_size", 4096)
        heads = read_integer(config, "num_attention_heads", 32)
        max_position_embeddings = read_integer(config, "max_position_embeddings", 2048)
        self = cls(
            vocab_size=read_integer(config, "vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=read_integer(config, "intermediate_size", 11008),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=read_integer(config, "num_key_value_heads", heads),
            head_dim=read_integer(config, "head_dim", max(hidden_size // heads, 1)),
            hidden_act=read_choice(config, "hidden_act", ACTIVATIONS, "silu"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=read_boolean(config, "tie_word_embeddings", False),
            attention_bias=read_boolean(config, "attention_bias", False),
            mlp_bias=read_boolean(config, "mlp_bias", False),
            rope=rope_from_config(config, max_position_embeddings),
        )
        self._check(head_dim_given=config.get("head_dim") is not None)
        return self

    def _check(self, head_dim_given: bool) -> None:
        if not head_dim_given and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}, or a head_dim of its own"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or (self.rope.rope_type == "dynamic" and self.head_dim == 2):
            raise ValueError(
                f"config: head_dim is {self.head_dim}, expected an even number, above 2 if rope is dynamic"
            )


class LlamaAttention(nnx.Module):
    """Self-attention with grouped key and value heads and rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        linear = partial(Linear, use_bias=config.attention_bias, rngs=rngs, param_dtype=param_dtype)
        query_features = config.num_attention_heads * config.head_dim
        key_features = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_features)
        self.k_proj = linear(config.hidden_size, key_features)
        self.v_proj = linear(config.hidden_size, key_features)
        self.o_proj = linear(query_features, config.hidden_size)
        self.head_dim = config.head_dim

    def queries_keys_values(
        self, hidden: Float[Array, "batch tokens hidden_size"], rotary: RotaryTables
    ) -> tuple[
        Float[Array, "batch heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
    ]:
        """The three projections by head, queries and keys after the rotary embedding."""
        query, key, value = (
            self._split_heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rotary(query, rotary), apply_rotary(key, rotary), value

    def __call__(
        self,
        hidden: Float[Array, "batch tokens hidden_size"],
        rotary: RotaryTables,
        *,
        offset: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
        cache: LayerCache | None,
        attention: AttentionConfig,
        basis: Array | None,
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        query, key, value = self.queries_keys_values(hidden, rotary)
        projected = None
        if cache is not None:
            cache = write(cache, key, value, offset, basis)
            key, value, projected = cache
        context = attend(attention, query, key, value, offset=offset, lengths=lengths, basis=basis, projected=projected)
        batch, tokens, _ = hidden.shape
        return self.o_proj(context.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)), cache

    def _split_heads(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch heads tokens head_dim"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class LlamaDecoderLayer(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        norm = partial(RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
        self.input_layernorm = norm()
        self.self_attn = LlamaAttention(config, rngs=rngs, param_dtype=param_dtype)
        self.post_attention_layernorm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            hidden_act=config.hidden_act,
            use_bias=config.mlp_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )

    def __call__(
        self,
        hidden: Float[Array, "batch tokens hidden_size"],
        rotary: RotaryTables,
        *,
        offset: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
        cache: LayerCache | None = None,
        attention: AttentionConfig,
        basis: Array | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden_size"], LayerCache | None]:
        attended, cache = self.self_attn(
            self.input_layernorm(hidden),
            rotary,
            offset=offset,
            lengths=lengths,
            cache=cache,
            attention=attention,
            basis=basis,
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache


class LlamaModel(nnx.Module):
    """Embedding, decoder layers and final norm, as the checkpoint groups them."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.layers = nnx.List(
            [LlamaDecoderLayer(config, rngs=rngs, param_dtype=param_dtype) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)


class LlamaForCausalLM(nnx.Module):
    """A Llama language model.

    Attributes:
        config: its configuration.
        model: embedding, layers and final norm.
        lm_head: the output layer, or None where it is tied to the embedding.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.model = LlamaModel(config, rngs=rngs, param_dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        lengths: Int[Array, " batch"] | None = None,
        *,
        attention: AttentionConfig = Dense(),  # noqa: B008 - a frozen value
        bases: Bases | None = None,
    ) -> Float32[Array, "batch tokens vocab_size"]:
        """Logits of the next token after each position.

        Args:
            input_ids: token ids, padded at the end.
            lengths: tokens of each row without the padding; all of them if not given. Logits past a row's length are
                finite but mean nothing.
            attention: `Dense()` or a `TwoStage(...)`.
            bases: calibrated projections, one per layer, where the attention's method needs them.
        """
        batch, tokens = input_ids.shape
        if lengths is None:
            lengths = jnp.full((batch,), tokens, jnp.int32)
        offset = jnp.zeros((batch,), jnp.int32)
        hidden, _ = self.hidden_states(
            input_ids, offset=offset, lengths=lengths, cache=None, attention=attention, bases=bases
        )
        return self.logits(hidden)

    def hidden_states(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        offset: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
        cache: KVCache | None,
        attention: AttentionConfig,
        bases: Bases | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden_size"], KVCache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values written to it.

        Args:
            input_ids: the tokens of this call, at positions `offset .. offset + tokens` of their rows.
            offset: position of each row's first token in this call; zeros where there is no cache.
            lengths: tokens of each whole row, those before and after this call included.
            cache: what earlier calls left, or None to attend over this call's tokens only.
            attention: `Dense()` or a `TwoStage(...)`.
            bases: calibrated projections, one per layer, where the attention's method needs them.
        """
        rotary = self._rotary_tables(input_ids, offset, lengths)
        hidden = self.model.embed_tokens(input_ids)
        caches: list[LayerCache] = []
        for index, layer in enumerate(self.model.layers):
            hidden, layer_cache = layer(
                hidden,
                rotary,
                offset=offset,
                lengths=lengths,
                cache=None if cache is None else cache[index],
                attention=attention,
                basis=None if bases is None else bases[index],
            )
            if layer_cache is not None:
                caches.append(layer_cache)
        return self.model.norm(hidden), None if cache is None else tuple(caches)

    def logits(self, hidden: Float[Array, "*rows hidden_size"]) -> Float32[Array, "*rows vocab_size"]:
        """Logits of hidden states that `hidden_states` returned."""
        if self.lm_head is None:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head.float32(hidden)

    def queries_and_keys(
        self, input_ids: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
    ) -> list[tuple[Float[Array, "batch heads tokens head_dim"], Float[Array, "batch kv_heads tokens head_dim"]]]:
        """Each layer's queries and keys after the rotary embedding, in a model with exact attention."""
        offset = jnp.zeros_like(lengths)
        rotary = self._rotary_tables(input_ids, offset, lengths)
        hidden = self.model.embed_tokens(input_ids)
        collected = []
        for layer in self.model.layers:
            query, key, _ = layer.self_attn.queries_keys_values(layer.input_layernorm(hidden), rotary)
            collected.append((query, key))
            hidden, _ = layer(hidden, rotary, offset=offset, lengths=lengths, attention=Dense())
        return collected

    def _rotary_tables(
        self, input_ids: Int[Array, "batch tokens"], offset: Int[Array, " batch"], lengths: Int[Array, " batch"]
    ) -> RotaryTables:
        positions = offset[:, None] + jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return rotary_tables(self.config.rope, self.config.head_dim, positions, lengths)
