"""What all decoder language models share: the common configuration, the usual layer, and the model around the layers.

An architecture's file adds its config fields and, where its mathematics differ, a layer of its own. The tree of
parameters is the same for all: model.embed_tokens, model.layers.N, model.norm, lm_head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from ..attention import Attention, Exact, KVCache, Plan, Rows
from ..attention.ops import cap
from .config import read_boolean, read_integer, read_layers
from .layers import layer_calls, run_layers
from .modules import Embedding, Linear
from .rope import Rope
from .self_attention import LayerCall, LayerConstants


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields that every decoder has, named as in the Hugging Face config, and what follows from others per layer.

    Attributes:
        relative_bias: whether attention logits have a relative position bias.
        fixed_tokens: None: rows may be of any length.
        default_pad_token_id: what `pad_token_id` is in transformers where a config does not give it.
        task: what the model is for: "text_generation", or a task of encoders, as `model/decoder_encoder.py` has them.
        num_labels: classes of an encoder's head.
        pad_token_id: id that a classifier of whole rows does not read at a row's end; None if there is none.
        causal: whether a token sees only those before it; else the model can only encode.
        ropes: each layer's rotary embedding; None for a layer without.
        windows: each layer's sliding window in tokens, as `SelfAttention` has it; None for a layer that sees all.
        ignored: what the Hugging Face config asks for in fields that transformers does not apply either.
    """

    model_type: ClassVar[str]
    relative_bias: ClassVar[bool] = False
    fixed_tokens: ClassVar[int | None] = None
    default_pad_token_id: ClassVar[int | None] = None

    task: str = "text_generation"
    num_labels: int = 0
    pad_token_id: int | None = None
    causal: bool = True
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        for rope in set(self.ropes):
            if rope is not None:
                rope.check(self.head_dim)

    @property
    def kind(self) -> str:
        """ "decoder" or "encoder", by the task."""
        return "decoder" if self.task == "text_generation" else "encoder"

    @property
    def max_tokens(self) -> int | None:
        """Tokens that a row may have in every layer; None where rotary embeddings stretch for any length."""
        longest = self.max_position_embeddings
        limits = {rope.max_tokens(longest) for rope in self.ropes if rope is not None} or {longest}
        return min((limit for limit in limits if limit is not None), default=None)


def read_sizes(
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int | None,
    num_hidden_layers: int,
    num_attention_heads: int,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
) -> dict[str, Any]:
    """The common fields of a Hugging Face config but `ropes` and `windows`; the arguments are the defaults.

    As in most architectures, `num_key_value_heads` defaults to `num_attention_heads`, which null stands for whatever
    the default, and `head_dim` to their share of `hidden_size`.

    Raises:
        ValueError: a field out of range.
    """
    hidden = read_integer(config, "hidden_size", hidden_size)
    heads = read_integer(config, "num_attention_heads", num_attention_heads)
    if num_key_value_heads is None or "num_key_value_heads" in config:
        num_key_value_heads = heads
    if config.get("head_dim") is None and head_dim is None and hidden % heads:
        raise ValueError(
            f"config: hidden_size is {hidden}, expected a multiple of num_attention_heads, {heads}, or a head_dim of "
            "its own"
        )
    return {
        "vocab_size": read_integer(config, "vocab_size", vocab_size),
        "hidden_size": hidden,
        "intermediate_size": read_integer(config, "intermediate_size", intermediate_size or 4 * hidden),
        "num_hidden_layers": read_layers(config, "num_hidden_layers", num_hidden_layers),
        "num_attention_heads": heads,
        "num_key_value_heads": read_integer(config, "num_key_value_heads", num_key_value_heads),
        "head_dim": read_integer(config, "head_dim", head_dim or max(hidden // heads, 1)),
        "max_position_embeddings": read_integer(config, "max_position_embeddings", max_position_embeddings),
        "tie_word_embeddings": read_boolean(config, "tie_word_embeddings", tie_word_embeddings),
    }


class DecoderModel(nnx.Module):
    """Embedding, layers and final norm, as checkpoints group them; `embed_positions` where positions are learned."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[nnx.Module],
        norm: nnx.Module,
        *,
        learned_positions: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.embed_positions = (
            Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs, param_dtype=param_dtype)
            if learned_positions
            else None
        )
        self.layers = nnx.List(layers)
        self.norm: Any = norm


class CausalLM(nnx.Module):
    """A decoder with its output layer.

    Attributes:
        config: its configuration.
        model: embedding, layers and final norm.
        lm_head: the output layer, or None where it is tied to the embedding.
        embedding_multiplier: factor of the embedded tokens.
        logit_multiplier: factor of the logits.
        logit_softcap: cap of the logits, or None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[nnx.Module],
        norm: nnx.Module,
        *,
        learned_positions: bool = False,
        embedding_multiplier: float = 1.0,
        logit_multiplier: float = 1.0,
        logit_softcap: float | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        self.config = config
        self.model = DecoderModel(
            config, layers, norm, learned_positions=learned_positions, rngs=rngs, param_dtype=param_dtype
        )
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        )
        self.embedding_multiplier, self.logit_multiplier = embedding_multiplier, logit_multiplier
        self.logit_softcap = logit_softcap

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        lengths: Int[Array, " batch"] | None = None,
        *,
        attention: Attention = Exact(),  # noqa: B008 - a frozen value
        constants: LayerConstants | None = None,
    ) -> Float32[Array, "batch tokens vocab_size"]:
        """Logits of the next token after each position.

        Args:
            input_ids: token ids, padded at the end.
            lengths: tokens of each row without the padding; all of them if not given. Logits past a row's length are
                finite but mean nothing.
            attention: `Exact()` or a `TwoStage(...)`, of the layers that see all tokens.
            constants: what the attention was calibrated to, layer by layer, if it needs that.
        """
        batch, tokens = input_ids.shape
        if lengths is None:
            lengths = jnp.full((batch,), tokens, jnp.int32)
        hidden, _ = self.hidden_states(input_ids, Rows.whole(lengths), plan=Plan(attention), constants=constants)
        return self.logits(hidden)

    def hidden_states(
        self,
        input_ids: Int[Array, "batch tokens"],
        rows: Rows,
        *,
        plan: Plan,
        decoding: bool = False,
        in_turn: bool = False,
        cache: KVCache | None = None,
        table: Int[Array, "slots slot_pages"] | None = None,
        constants: LayerConstants | None = None,
        observe: Callable[[Array, Array], None] | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden_size"], KVCache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values in it.

        Args:
            input_ids: the tokens of this call, at positions `offset .. offset + tokens` of their rows.
            rows: of the call; without a cache, whole rows.
            plan: the attention of the layers that see all tokens.
            decoding: whether the call decodes, and takes that attention of the plan.
            in_turn: whether rows may be consecutive tokens of one slot, as `LayerCall` has it.
            cache: what earlier calls left, or None to attend over this call's tokens only.
            table: the pages of each slot of the cache; None where a slot is one page.
            constants: what the attention was calibrated to, layer by layer, if it needs that.
            observe: is given the queries and keys of each layer in turn, while the function is traced.
        """
        positions = rows.offset[:, None] + jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        call = LayerCall(rows, plan, decoding, in_turn, table=table, observe=observe)
        hidden = self._embed(input_ids, positions, rows.length)
        hidden, cache = run_layers(
            self.model.layers, hidden, call, self.config, positions, cache=cache, constants=constants
        )
        return self.model.norm(hidden), cache

    @property
    def layers(self) -> Sequence[Any]:
        """The layers in turn."""
        return self.model.layers

    def logits(self, hidden: Float[Array, "*rows hidden_size"]) -> Float32[Array, "*rows vocab_size"]:
        """Logits of hidden states that `hidden_states` returned."""
        head = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head.in_float32
        return cap(head(hidden) * self.logit_multiplier, self.logit_softcap)

    def first_layer(
        self, input_ids: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch tokens hidden_size"], list[LayerCall]]:
        """What the first layer takes, and each layer's call over whole rows, with exact attention."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        calls = layer_calls(LayerCall(Rows.whole(lengths), Plan()), self.config, positions)
        return self._embed(input_ids, positions, lengths), calls

    def queries_and_keys(
        self, input_ids: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
    ) -> list[tuple[Float[Array, "batch heads tokens head_dim"], Float[Array, "batch kv_heads tokens head_dim"]]]:
        """Each layer's queries and keys as attention takes them, in a model with exact attention."""
        collected: list[tuple[Array, Array]] = []
        self.hidden_states(
            input_ids,
            Rows.whole(lengths),
            plan=Plan(),
            observe=lambda query, key: collected.append((query, key)),
        )
        return collected

    def _embed(
        self,
        input_ids: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch tokens hidden_size"]:
        hidden = self.model.embed_tokens(input_ids)
        if self.embedding_multiplier != 1:
            # Rounded to the activations' dtype first, as transformers does.
            hidden = hidden * jnp.asarray(self.embedding_multiplier, hidden.dtype)
        if self.model.embed_positions is not None:
            # Padding takes the position of its row's last token, because there may be none in the table for its own.
            last = jnp.maximum(lengths - 1, 0)
            hidden = hidden + self.model.embed_positions(jnp.minimum(positions, last[:, None]))
        return hidden
