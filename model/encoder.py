"""What all encoders share: the common configuration, embeddings of text, layers, pooler and task head.

An encoder takes named inputs and gives named outputs. The tree of parameters is the same for all: embeddings,
layers.N, norm, pooler, head.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..attention import Attention, Exact, Plan, Rows
from .config import read_boolean, read_integer
from .decoder import DecoderConfig
from .layers import layer_calls, run_layers
from .modules import ACTIVATIONS, Embedding, Linear
from .pooling import TORCH_ACTIVATIONS, SentenceEmbedding
from .rope import Rope
from .self_attention import LayerCall, LayerConstants

TASKS = {
    "Model": "features",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
"""What an encoder is for, by the end of the class name under a config's `architectures`."""
CLASSIFYING = ("sequence_classification", "token_classification")
"""The tasks whose classes have names."""


@dataclass(frozen=True)
class InputInfo:
    """An input of an encoder: its shape without the batch dimension, and its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The fields that every encoder has, named as in the Hugging Face config where that is possible.

    Attributes:
        kind: "encoder", as the decoders' is "decoder".
        relative_bias: whether attention logits have a relative position bias.
        task: one of the values of `TASKS`.
        num_labels: classes of the task head.
        pooler: whether there is one, `Encoder.pooler`.
        max_tokens: tokens that a row may have; None for any number.
        fixed_tokens: tokens that every row has, for images and sound; None for text.
        ropes: each layer's rotary embedding; None for a layer without.
        windows: each layer's sliding window in tokens to both sides, as `SelfAttention` has it; None for all tokens.
    """

    model_type: ClassVar[str]
    kind: ClassVar[str] = "encoder"
    relative_bias: ClassVar[bool] = False

    task: str
    num_labels: int
    pooler: bool = False
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_tokens: int | None
    fixed_tokens: int | None = None
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if self.task == "question_answering" and self.num_labels != 2:
            raise ValueError(
                f"config: num_labels is {self.num_labels}, expected 2 for the start and the end of an answer"
            )
        for rope in set(self.ropes):
            if rope is not None:
                rope.check(self.head_dim)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it: never."""
        return False

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.num_attention_heads


def read_task(config: Mapping[str, Any]) -> str:
    """What the model is for, from the class name under `architectures`; "features" if there is none.

    Raises:
        ValueError: a class for something else.
    """
    names = config.get("architectures") or ["Model"]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else repr(names)
    match = re.search(f"({'|'.join(TASKS)})$", name)
    if match is None:
        raise ValueError(f"config: architectures names {name}, supported: classes that end in: {', '.join(TASKS)}")
    return TASKS[match[1]]


def require_class(config: Mapping[str, Any], classes: Collection[str]) -> None:
    """ValueError unless the class name under `architectures` is one of those; there may be none.

    For encoders of models that have a decoder too: what else stands behind an encoder would be left out silently.
    """
    names = config.get("architectures")
    if not names:
        return
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"config: architectures names {name}, supported: {', '.join(classes)}")


def read_pooler(config: Mapping[str, Any], task: str) -> bool:
    """Whether a model without a task head has a pooler: yes, unless `add_pooling_layer` is false.

    Hugging Face configs do not have that field: converting adds it where the checkpoint has no tensors of a pooler.
    """
    return task == "features" and read_boolean(config, "add_pooling_layer", True)


def read_num_labels(config: Mapping[str, Any]) -> int:
    """Classes of the task head: `num_labels`, or else the entries of `id2label`, or transformers' default of 2.

    Raises:
        ValueError: `num_labels` is no number, or `id2label` no object whose names are numbers.
    """
    return read_integer(config, "num_labels", len(_read_id2label(config)) or 2)


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in their order: those of `id2label`, and transformers' LABEL_0, LABEL_1 ... for others.

    As in transformers, `id2label` does not count where it has more or fewer entries than `num_labels` says.

    Raises:
        ValueError: as `read_num_labels`.
    """
    count, named = read_num_labels(config), _read_id2label(config)
    return tuple((named if len(named) == count else {}).get(index, f"LABEL_{index}") for index in range(count))


def unnamed_labels(config: Mapping[str, Any]) -> list[str]:
    """The names of those classes for which an `id2label` that has entries gives none.

    Raises:
        ValueError: as `read_num_labels`.
    """
    named = _read_id2label(config).values()
    return [label for label in read_labels(config) if label not in named] if named else []


def _read_id2label(config: Mapping[str, Any]) -> dict[int, str]:
    labels = config.get("id2label") or {}
    try:
        return {int(index): str(label) for index, label in labels.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"config: id2label is {labels!r}, expected an object with a name for each class, by numbers from 0 on"
        ) from None


class TextEmbeddings(nnx.Module):
    """Tokens, with positions and segments where a model has them, and a norm.

    Positions are a learned table of so many rows, or a module that makes vectors of them.

    Attributes:
        token_types: segments; if there is only one, it is no input.
        padding_id: id whose tokens have no position of their own, while others count from `padding_id + 1` (RoBERTa);
            None where positions count from 0.
        multiplier: factor of the embedded tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        vocab_size: int,
        positions: int | nnx.Module,
        token_types: int,
        norm: nnx.Module | None,
        padding_id: int | None = None,
        multiplier: float = 1.0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        def embedding(count: int) -> Embedding | None:
            return Embedding(count, hidden_size, rngs=rngs, param_dtype=param_dtype) if count else None

        self.word_embeddings = Embedding(vocab_size, hidden_size, rngs=rngs, param_dtype=param_dtype)
        self.position_embeddings: Any = embedding(positions) if isinstance(positions, int) else positions
        self.token_type_embeddings = embedding(token_types)
        self.norm: Any = norm
        self.token_types, self.padding_id, self.multiplier = token_types, padding_id, multiplier

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "batch tokens hidden_size"]:
        ids = inputs["input_ids"]
        hidden = self.word_embeddings(ids)
        if self.multiplier != 1:
            # Rounded to the activations' dtype first, as transformers does.
            hidden = hidden * jnp.asarray(self.multiplier, hidden.dtype)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(self._positions(ids))
        if self.token_type_embeddings is not None:
            types = inputs["token_type_ids"] if self.token_types > 1 else jnp.zeros_like(ids)
            hidden = hidden + self.token_type_embeddings(types)
        return hidden if self.norm is None else self.norm(hidden)

    def inputs(self, tokens: int) -> dict[str, InputInfo]:
        """The inputs for rows of so many tokens."""
        names = ("input_ids", "token_type_ids") if self.token_types > 1 else ("input_ids",)
        return dict.fromkeys(names, InputInfo((tokens,), "int32"))

    def _positions(self, ids: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        if self.padding_id is None:
            return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        counted = (ids != self.padding_id).astype(jnp.int32)
        # Padding behind a row's end stays inside the table.
        return jnp.cumsum(counted, axis=1, dtype=jnp.int32) * counted + self.padding_id


class Head(nnx.Module):
    """`out(norm(activation(dense(x))))`, of which a model may lack any part.

    Attributes:
        activation: a name of `ACTIVATIONS`, or None.
    """

    def __init__(
        self,
        *,
        dense: Linear | None = None,
        activation: str | None = None,
        norm: nnx.Module | None = None,
        out: Linear | None = None,
    ) -> None:
        self.dense, self.activation, self.norm, self.out = dense, activation, norm, out

    def __call__(self, x: Float[Array, "*rows hidden_size"]) -> Float[Array, "*rows features"]:
        """What goes into `out`, or comes out of a head without one, in x's dtype."""
        if self.dense is not None:
            x = self.dense(x)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x.astype(jnp.float32)).astype(x.dtype)
        norm: Any = self.norm
        return x if norm is None else norm(x)


class TiedHead(Head):
    """A head whose output layer is the table of word embeddings, with a bias of its own if `use_bias`."""

    def __init__(self, *, vocab_size: int, use_bias: bool = True, param_dtype: DTypeLike, **parts: Any) -> None:
        super().__init__(**parts)
        self.bias = nnx.Param(jnp.zeros((vocab_size,), param_dtype)) if use_bias else None


def masked_lm_head(
    vocab_size: int,
    hidden_size: int,
    *,
    tied: bool,
    use_bias: bool = True,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    **parts: Any,
) -> Head:
    """A head with the given parts of `Head` and an output layer over the vocabulary, its own if not tied."""
    if tied:
        return TiedHead(vocab_size=vocab_size, use_bias=use_bias, param_dtype=param_dtype, **parts)
    return Head(out=Linear(hidden_size, vocab_size, use_bias=use_bias, rngs=rngs, param_dtype=param_dtype), **parts)


class Encoder(nnx.Module):
    """An encoder with what stands behind it.

    Attributes:
        config: its configuration.
        embeddings: gives the first hidden states from the inputs, and says with `inputs(tokens)` which those are.
        layers: each takes hidden states and a `LayerCall`, and gives hidden states and None.
        norm: final norm, or None.
        pooler: makes one vector of a row's first token, or None.
        head: the task's, or None for "features".
        head_pooling: what a head for whole rows reads: "pooler", "first", "mean", "padded_mean" (the sum over a row's
            tokens divided by the model's `max_tokens`), "last" (the last token that is not the configuration's
            `pad_token_id`), or "tokens" for a head that pools by itself.
        sentence_embedding: that of a sentence embedder, or None; it takes the pooler's place in what `encode` gives as
            `pooled`.
        score_activation: name of the activation in torch.nn that makes scores of a classifier's logits, or None.
    """

    def __init__(
        self,
        config: EncoderConfig | DecoderConfig,
        embeddings: nnx.Module,
        layers: Sequence[nnx.Module],
        *,
        norm: nnx.Module | None = None,
        pooler: Head | None = None,
        head: Head | None = None,
        head_pooling: str = "pooler",
    ) -> None:
        self.config = config
        self.embeddings: Any = embeddings
        self.layers = nnx.List(layers)
        self.norm: Any = norm
        self.pooler, self.head, self.head_pooling = pooler, head, head_pooling
        self.sentence_embedding: SentenceEmbedding | None = None
        self.score_activation: str | None = None

    def inputs(self, tokens: int) -> dict[str, InputInfo]:
        """The inputs for rows of so many tokens; every row's `lengths` go beside them."""
        return self.embeddings.inputs(tokens)

    @property
    def pools_without_prompt(self) -> bool:
        """Whether it is a sentence embedder that leaves the prompt's tokens out of its pooling."""
        return self.sentence_embedding is not None and not self.sentence_embedding.config.include_prompt

    def encode(
        self,
        inputs: Mapping[str, Array],
        lengths: Int[Array, " batch"],
        *,
        attention: Attention = Exact(),  # noqa: B008 - a frozen value
        constants: LayerConstants | None = None,
        observe: Callable[[Array, Array], None] | None = None,
        prompt_lengths: Int[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """What the encoder makes of its inputs.

        Args:
            inputs: arrays [batch, ...] by name, as `inputs` describes them; token ids are padded at the end.
            lengths: tokens of each row without the padding; outputs past them are finite but mean nothing.
            attention: `Exact()` or a `TwoStage(...)`, of the layers that see all tokens.
            constants: what the attention was calibrated to, layer by layer, if it needs that.
            observe: is given the queries and keys of each layer in turn, while the function is traced.
            prompt_lengths: first tokens of each row that a sentence embedder may have to leave out of its pooling
                (`pools_without_prompt`).

        Returns:
            `last_hidden_state` [batch, tokens, hidden_size]; `pooled` [batch, hidden_size] from a model with a pooler,
            and in float32 from a sentence embedder, whose vector may have another width; `logits` in float32 from a
            model with a task head: [batch, num_labels] for whole rows, [batch, tokens, num_labels] for token
            classification, [batch, tokens, 2] (start and end) for question answering, [batch, tokens, vocab_size] for
            masked language models; `scores`, the logits of whole rows with `score_activation` behind them.
        """
        config = self.config
        hidden = self.embeddings(inputs)
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
        call = LayerCall(Rows.whole(lengths), Plan(attention), observe=observe)
        hidden, _ = run_layers(self.layers, hidden, call, config, positions, constants=constants)
        if self.norm is not None:
            hidden = self.norm(hidden)
        outputs = {"last_hidden_state": hidden}
        pooled = None if self.pooler is None else self.pooler(hidden[:, 0])
        if self.head is not None:
            outputs["logits"] = self._logits(self.head, inputs, hidden, pooled, lengths)
            if self.score_activation is not None:
                outputs["scores"] = TORCH_ACTIVATIONS[self.score_activation](outputs["logits"])
        if self.sentence_embedding is not None:
            pooled = self.sentence_embedding(hidden, lengths, prompt_lengths)
        return outputs if pooled is None else outputs | {"pooled": pooled}

    def first_layer(
        self, inputs: Mapping[str, Array], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch tokens hidden_size"], list[LayerCall]]:
        """What the first layer takes, and each layer's call over whole rows, with exact attention."""
        hidden = self.embeddings(inputs)
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
        return hidden, layer_calls(LayerCall(Rows.whole(lengths), Plan()), self.config, positions)

    def queries_and_keys(
        self, inputs: Mapping[str, Array], lengths: Int[Array, " batch"]
    ) -> list[tuple[Float[Array, "batch heads tokens head_dim"], Float[Array, "batch kv_heads tokens head_dim"]]]:
        """Each layer's queries and keys as attention takes them, in a model with exact attention."""
        collected: list[tuple[Array, Array]] = []
        self.encode(inputs, lengths, observe=lambda query, key: collected.append((query, key)))
        return collected

    def _logits(
        self,
        head: Head,
        inputs: Mapping[str, Array],
        hidden: Float[Array, "batch tokens hidden_size"],
        pooled: Float[Array, "batch hidden_size"] | None,
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "..."]:
        x = hidden
        if self.config.task == "sequence_classification":
            x = self._whole_rows(inputs, hidden, pooled, lengths)
        x = head(x)
        if isinstance(head, TiedHead):
            logits = self.embeddings.word_embeddings.logits(x)
            return logits if head.bias is None else logits + head.bias[...].astype(jnp.float32)
        assert head.out is not None
        return head.out.in_float32(x)

    def _whole_rows(
        self,
        inputs: Mapping[str, Array],
        hidden: Float[Array, "batch tokens hidden_size"],
        pooled: Float[Array, "batch hidden_size"] | None,
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """What a head for whole rows reads."""
        if self.head_pooling == "last":
            assert isinstance(self.config, DecoderConfig)
            return last_token(hidden, inputs["input_ids"], lengths, self.config.pad_token_id)
        mean = mean_over_tokens(hidden, lengths)
        if self.head_pooling == "padded_mean":
            assert self.config.max_tokens is not None
            return (mean * (lengths[:, None] / self.config.max_tokens)).astype(mean.dtype)
        rows = {"pooler": pooled, "first": hidden[:, 0], "mean": mean, "tokens": hidden}[self.head_pooling]
        assert rows is not None
        return rows


def last_token(
    hidden: Float[Array, "batch tokens hidden_size"],
    ids: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"],
    pad_token_id: int | None,
) -> Float[Array, "batch hidden_size"]:
    """The last of each row's first `lengths` tokens that is not `pad_token_id`; the first one if all of them are.

    transformers finds a row's end by that id alone, so that a text which itself ends with it is read before.
    """
    position = jnp.arange(hidden.shape[1])
    inside = position < lengths[:, None]
    if pad_token_id is not None:
        inside &= ids != pad_token_id
    last = jnp.max(jnp.where(inside, position, 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def mean_over_tokens(
    hidden: Float[Array, "batch tokens hidden_size"], lengths: Int[Array, " batch"]
) -> Float[Array, "batch hidden_size"]:
    """The mean of each row's first `lengths` tokens, summed in float32."""
    inside = jnp.arange(hidden.shape[1]) < lengths[:, None]
    total = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    return (total / jnp.maximum(lengths, 1)[:, None]).astype(hidden.dtype)
