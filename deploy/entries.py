"""The functions that are compiled for each bucket: a decoder's prefill, decode, check and score, an encoder's encode.

All take the weights as a flat tuple in the order of their names and the KV cache, and are pure: the cache that goes in
is donated, the one that comes out takes its place. An encoder's cache is empty.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ..attention import KVCache, Plan, Rows
from ..model.encoder import Encoder
from ..model.self_attention import LayerConstants
from .agreement import decoder_arguments
from .manifest import TAIL_ENTRY, ArrayInfo, CacheInfo, kv_arrays

Weights = tuple[Array, ...]

# Positions whose logits [positions, vocab] are held at once in `score`.
SCORE_BLOCK = 256
_CONSTANTS = "attention."


@dataclass(frozen=True)
class Entry:
    """A function to compile.

    Attributes:
        function: takes weights, cache and `arguments`, and gives the cache and `results`.
        arguments: their names, shapes and dtypes.
        results: their names.
    """

    function: Callable[..., tuple[Any, ...]]
    arguments: dict[str, ArrayInfo]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Entries(ABC):
    """A model taken apart into named arrays, and the functions over them.

    Attributes:
        names: of the weights, sorted; what the attention was calibrated to is among them, as `attention.LAYER.NAME`.
        weights: the arrays, in the order of `names`.
        rebuild: the module from its parameters by name.
        plan: exact until it is replaced.
    """

    names: tuple[str, ...]
    weights: Weights
    rebuild: Callable[[Mapping[str, Array]], Any]
    plan: Plan

    @abstractmethod
    def cache(self, capacity: int, batch: int, dtype: str, page: int) -> CacheInfo:
        """The arrays of a bucket's cache, keys and values of that dtype; `page` is 0 where a slot is one page."""

    @abstractmethod
    def functions(self, capacity: int, chunk: int, batch: int, page: int) -> dict[str, Entry]:
        """What is compiled for a bucket, by name."""

    @classmethod
    def of(cls, model: nnx.Module, constants: LayerConstants | None) -> "Entries":
        """Takes a model and what its attention was calibrated to, layer by layer, apart."""
        graph, state = nnx.split(model)
        leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        paths = [".".join(str(key.key) for key in path) for path, _ in leaves]

        def rebuild(named: Mapping[str, Array]) -> Any:
            return nnx.merge(graph, jax.tree.unflatten(tree, [named[path] for path in paths]))

        named = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
        for layer, learned in enumerate(constants or ()):
            named |= {f"{_CONSTANTS}{layer}.{name}": array for name, array in learned.items()}
        names = tuple(sorted(named))
        return cls(names, tuple(named[name] for name in names), rebuild, Plan())

    def model(self, weights: Weights) -> Any:
        """The module with these weights."""
        return self._model(weights)[0]

    def _model(self, weights: Weights) -> tuple[Any, LayerConstants]:
        """The model, and the constants of each of its layers."""
        named = dict(zip(self.names, weights, strict=True))
        model = self.rebuild(named)
        constants: list[dict[str, Array]] = [{} for _ in range(model.config.num_hidden_layers)]
        for path, array in named.items():
            if path.startswith(_CONSTANTS):
                layer, name = path.removeprefix(_CONSTANTS).split(".")
                constants[int(layer)][name] = array
        return model, tuple(constants)


class DecoderEntries(Entries):
    """Prefill and score, of one row at a time, decode, of all slots, and check, of several tokens of some slots."""

    def cache(self, capacity: int, batch: int, dtype: str, page: int) -> CacheInfo:
        """Keys and values of each layer: of the last tokens of a row in a layer with a sliding window, of all of them
        in the others, which also have what the plan keeps of the keys and of each slot."""
        model, _ = self._model(self.weights)
        config = model.config
        fields = self.plan.fields(config.head_dim)
        # Entries stand for whole runs of tokens.
        length = page or -(-capacity // (unit := max((kept.tokens for kept in fields.values()), default=1))) * unit
        pages = batch * (capacity // page if page else 1)

        def tokens(pages: int, length: int) -> dict[str, ArrayInfo]:
            shape = (pages, config.num_key_value_heads, length)
            widths = {"key": (config.head_dim,), "value": (config.head_dim,)}
            return {name: ArrayInfo((*shape, *widths.get(name, ())), kind) for name, kind in kv_arrays(dtype).items()}

        def layer(window: int, state: dict[str, ArrayInfo]) -> dict[str, ArrayInfo]:
            if window:
                return tokens(batch, window)
            heads = (pages, config.num_key_value_heads)
            index = {
                name: ArrayInfo((*heads, length // kept.tokens, *kept.shape), kept.dtype)
                for name, kept in fields.items()
            }
            return tokens(pages, length) | index | state

        windows = tuple(min(window or 0, capacity) for window in config.windows)
        states = [
            {name: ArrayInfo((batch, *kept.shape), kept.dtype.name) for name, kept in state.items()}
            for state in (self.plan.state(number, config.num_key_value_heads) for number in range(len(windows)))
        ]
        names = tuple(sorted(set().union(*states)))
        return CacheInfo(tuple(map(layer, windows, states)), windows, page, names)

    def functions(self, capacity: int, chunk: int, batch: int, page: int) -> dict[str, Entry]:
        arguments = decoder_arguments(capacity, chunk, batch, page)
        prefills = {
            name: Entry(self.prefill, arguments[name], ("logits",))
            for name in ("prefill", TAIL_ENTRY)
            if name in arguments
        }
        return {
            **prefills,
            "decode": Entry(self.decode, arguments["decode"], ("logits",)),
            "check": Entry(functools.partial(self.decode, in_turn=True), arguments["check"], ("logits",)),
            "score": Entry(self.score, arguments["score"], ("logprobs", "argmax")),
        }

    def prefill(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Int[Array, "rows chunk"],
        slot: Int[Array, " rows"],
        offset: Int[Array, " rows"],
        length: Int[Array, " rows"],
        table: Int[Array, "slots slot_pages"] | None = None,
    ) -> tuple[KVCache, Float[Array, "rows vocab"]]:
        """Takes one chunk of prompts, `offset .. offset + chunk`.

        `length` is that of the whole prompt, the same in every chunk. The logits are those after each row's last token,
        and mean something only for rows whose last token lies in this chunk.
        """
        model, hidden, cache = self._hidden(weights, cache, tokens, Rows(slot, offset, length), table)
        last = jnp.clip(length - 1 - offset, 0, tokens.shape[1] - 1)
        return cache, model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def decode(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Int[Array, " rows"],
        slot: Int[Array, " rows"],
        offset: Int[Array, " rows"],
        table: Int[Array, "slots slot_pages"] | None = None,
        in_turn: bool = False,
    ) -> tuple[KVCache, Float[Array, "rows vocab"]]:
        """Takes one token a row at `offset` and gives the logits after it; those of idle rows mean nothing.

        With `in_turn` rows may be consecutive tokens of one slot, the first first: what a row gives and leaves is what
        it would if each had a call of its own.
        """
        rows = Rows(slot, offset, offset + 1)
        model, hidden, cache = self._hidden(
            weights, cache, tokens[:, None], rows, table, decoding=True, in_turn=in_turn
        )
        return cache, model.logits(hidden[:, 0])

    def score(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Int[Array, "rows chunk"],
        targets: Int[Array, "rows chunk"],
        slot: Int[Array, " rows"],
        offset: Int[Array, " rows"],
        length: Int[Array, " rows"],
        table: Int[Array, "slots slot_pages"] | None = None,
    ) -> tuple[KVCache, Float[Array, "rows chunk"], Int[Array, "rows chunk"]]:
        """Takes one chunk as `prefill` does, and gives each target's log-probability and the most likely token."""
        model, hidden, cache = self._hidden(weights, cache, tokens, Rows(slot, offset, length), table)
        rows, chunk, size = hidden.shape
        logprobs, argmax = score_positions(model, hidden.reshape(-1, size), targets.reshape(-1), score_block(chunk))
        return cache, logprobs.reshape(rows, chunk), argmax.reshape(rows, chunk)

    def _hidden(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Int[Array, "rows tokens"],
        rows: Rows,
        table: Int[Array, "slots slot_pages"] | None,
        decoding: bool = False,
        in_turn: bool = False,
    ) -> tuple[Any, Float[Array, "rows tokens hidden"], KVCache]:
        model, constants = self._model(weights)
        hidden, cache = model.hidden_states(
            tokens,
            rows,
            plan=self.plan,
            decoding=decoding,
            in_turn=in_turn,
            cache=cache,
            table=table,
            constants=constants,
        )
        return model, hidden, cache


class EncoderEntries(Entries):
    """Encode: rows of the bucket's whole length, in one call."""

    def cache(self, capacity: int, batch: int, dtype: str, page: int) -> CacheInfo:
        """None."""
        return CacheInfo((), (), 0)

    def functions(self, capacity: int, chunk: int, batch: int, page: int) -> dict[str, Entry]:
        model, _ = self._model(self.weights)
        arguments = {name: ArrayInfo((batch, *info.shape), info.dtype) for name, info in model.inputs(capacity).items()}
        arguments["lengths"] = ArrayInfo((batch,), "int32")
        if model.pools_without_prompt:
            arguments["prompt_lengths"] = ArrayInfo((batch,), "int32")
        specs = [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in arguments.values()]
        outputs = jax.eval_shape(functools.partial(self._outputs, tuple(arguments)), self.weights, *specs)
        names = tuple(outputs)

        def encode(weights: Weights, cache: KVCache, *arrays: Array) -> tuple[Any, ...]:
            outputs = self._outputs(tuple(arguments), weights, *arrays)
            return cache, *(outputs[name] for name in names)

        return {"encode": Entry(encode, arguments, names)}

    def _outputs(self, names: tuple[str, ...], weights: Weights, *arrays: Array) -> dict[str, Array]:
        model, constants = self._model(weights)
        inputs = dict(zip(names, arrays, strict=True))
        lengths, prompt_lengths = inputs.pop("lengths"), inputs.pop("prompt_lengths", None)
        return model.encode(
            inputs, lengths, attention=self.plan.prompt, constants=constants, prompt_lengths=prompt_lengths
        )


def entries_class(model: nnx.Module) -> type[Entries]:
    """The entries that a model has."""
    return EncoderEntries if isinstance(model, Encoder) else DecoderEntries


def score_positions(
    model: Any, hidden: Float[Array, "positions hidden"], targets: Int[Array, " positions"], block: int
) -> tuple[Float[Array, " positions"], Int[Array, " positions"]]:
    """Each target's log-probability and the most likely token, from the logits of `block` positions at a time."""

    def score(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.logits(args[0])
        given = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
        logprobs = given - jax.nn.logsumexp(logits, axis=-1)
        return logprobs, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    logprobs, argmax = lax.map(score, (hidden.reshape(-1, block, hidden.shape[-1]), targets.reshape(-1, block)))
    return logprobs.reshape(-1), argmax.reshape(-1)


def score_block(chunk: int) -> int:
    """The largest divisor of a chunk that is at most SCORE_BLOCK."""
    return next(size for size in range(min(chunk, SCORE_BLOCK), 0, -1) if chunk % size == 0)
