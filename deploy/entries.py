"""The functions that are compiled for each bucket: a decoder's prefill, decode and score, an encoder's encode.

All take the weights as a flat tuple in the order of their names and the KV cache as plain tuples, and are pure: the
cache that goes in is donated, the one that comes out takes its place. An encoder's cache is empty.
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

from ..attention import AttentionConfig, Dense, TwoStage
from ..attention.cache import KVCache, LayerCache
from ..attention.methods import padded_rank
from ..model.encoder import Encoder
from ..model.self_attention import Bases
from .agreement import decoder_arguments
from .manifest import ArrayInfo, CacheInfo

PlainCache = tuple[tuple[Array, ...], ...]
Weights = tuple[Array, ...]

# Positions whose logits [positions, vocab] are held at once in `score`.
SCORE_BLOCK = 256
_BASES = "bases."


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
        names: of the weights, sorted; calibrated bases are among them as `bases.0`, `bases.1`, ...
        weights: the arrays, in the order of `names`.
        rebuild: the module from its parameters by name.
        attention: exact until it is replaced.
    """

    names: tuple[str, ...]
    weights: Weights
    rebuild: Callable[[Mapping[str, Array]], Any]
    attention: AttentionConfig

    @abstractmethod
    def cache(self, capacity: int, batch: int, dtype: str) -> CacheInfo:
        """The shapes of a bucket's cache."""

    @abstractmethod
    def functions(self, capacity: int, chunk: int, batch: int) -> dict[str, Entry]:
        """What is compiled for a bucket, by name."""

    @classmethod
    def of(cls, model: nnx.Module, bases: Bases | None) -> "Entries":
        """Takes a model and its calibrated bases (one for each layer that needs one, or None for all) apart."""
        graph, state = nnx.split(model)
        leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        paths = [".".join(str(key.key) for key in path) for path, _ in leaves]

        def rebuild(named: Mapping[str, Array]) -> Any:
            return nnx.merge(graph, jax.tree.unflatten(tree, [named[path] for path in paths]))

        named = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
        named |= {f"{_BASES}{layer}": basis for layer, basis in enumerate(bases or ()) if basis is not None}
        names = tuple(sorted(named))
        return cls(names, tuple(named[name] for name in names), rebuild, Dense())

    def _model(self, weights: Weights) -> tuple[Any, Bases | None]:
        named = dict(zip(self.names, weights, strict=True))
        model = self.rebuild(named)
        bases = tuple(named.get(f"{_BASES}{layer}") for layer in range(model.config.num_hidden_layers))
        return model, bases if any(basis is not None for basis in bases) else None


class DecoderEntries(Entries):
    """Prefill, decode and score. `attention` is that of prompts and scoring; `decode` is always exact."""

    def cache(self, capacity: int, batch: int, dtype: str) -> CacheInfo:
        """Keys and values of each layer, and the projected keys where stage 1 ranks them."""
        model, bases = self._model(self.weights)
        config = model.config
        heads = (batch, config.num_key_value_heads, capacity)
        keys_and_values = (ArrayInfo((*heads, config.head_dim), dtype),) * 2
        if bases is None or not isinstance(self.attention, TwoStage):
            return CacheInfo((keys_and_values,) * config.num_hidden_layers)
        return CacheInfo(
            tuple(
                keys_and_values
                if basis is None
                else (*keys_and_values, ArrayInfo((*heads, padded_rank(basis)), "int8"))
                for basis in bases
            )
        )

    def functions(self, capacity: int, chunk: int, batch: int) -> dict[str, Entry]:
        arguments = decoder_arguments(chunk, batch)
        return {
            "prefill": Entry(self.prefill, arguments["prefill"], ("logits",)),
            "decode": Entry(self.decode, arguments["decode"], ("logits",)),
            "score": Entry(self.score, arguments["score"], ("logprobs", "argmax")),
        }

    def prefill(
        self,
        weights: Weights,
        cache: PlainCache,
        tokens: Int[Array, "batch chunk"],
        offset: Int[Array, ""],
        lengths: Int[Array, " batch"],
    ) -> tuple[PlainCache, Float[Array, "batch vocab"]]:
        """Takes one chunk of prompts, `offset .. offset + chunk`.

        `lengths` are those of the whole prompts, the same in every chunk. The logits are those after each row's last
        token, and mean something only for rows whose last token lies in this chunk.
        """
        model, hidden, cache = self._hidden(weights, cache, tokens, offset, lengths)
        last = jnp.clip(lengths - 1 - offset, 0, tokens.shape[1] - 1)
        return cache, model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def decode(
        self,
        weights: Weights,
        cache: PlainCache,
        tokens: Int[Array, " batch"],
        positions: Int[Array, " batch"],
    ) -> tuple[PlainCache, Float[Array, "batch vocab"]]:
        """Takes one token a row at `positions` and gives the logits after it.

        Attention is exact whatever the prompt's was: for one query its cost is linear in the length.
        """
        model, bases = self._model(weights)
        hidden, new = model.hidden_states(
            tokens[:, None],
            offset=positions,
            lengths=positions + 1,
            cache=_layers(cache),
            attention=Dense(),
            bases=bases,
        )
        return _plain(new), model.logits(hidden[:, 0])

    def score(
        self,
        weights: Weights,
        cache: PlainCache,
        tokens: Int[Array, "batch chunk"],
        targets: Int[Array, "batch chunk"],
        offset: Int[Array, ""],
        lengths: Int[Array, " batch"],
    ) -> tuple[PlainCache, Float[Array, "batch chunk"], Int[Array, "batch chunk"]]:
        """Takes one chunk as `prefill` does, and gives each target's log-probability and the most likely token."""
        model, hidden, cache = self._hidden(weights, cache, tokens, offset, lengths)
        batch, chunk, size = hidden.shape
        logprobs, argmax = score_positions(model, hidden.reshape(-1, size), targets.reshape(-1), score_block(chunk))
        return cache, logprobs.reshape(batch, chunk), argmax.reshape(batch, chunk)

    def _hidden(
        self, weights: Weights, cache: PlainCache, tokens: Array, offset: Array, lengths: Array
    ) -> tuple[Any, Float[Array, "batch chunk hidden"], PlainCache]:
        model, bases = self._model(weights)
        hidden, new = model.hidden_states(
            tokens,
            offset=jnp.broadcast_to(offset, lengths.shape),
            lengths=lengths,
            cache=_layers(cache),
            attention=self.attention,
            bases=bases,
        )
        return model, hidden, _plain(new)


class EncoderEntries(Entries):
    """Encode: rows of the bucket's whole length, in one call."""

    def cache(self, capacity: int, batch: int, dtype: str) -> CacheInfo:
        """None."""
        return CacheInfo(())

    def functions(self, capacity: int, chunk: int, batch: int) -> dict[str, Entry]:
        model, _ = self._model(self.weights)
        arguments = {name: ArrayInfo((batch, *info.shape), info.dtype) for name, info in model.inputs(capacity).items()}
        arguments["lengths"] = ArrayInfo((batch,), "int32")
        if model.pools_without_prompt:
            arguments["prompt_lengths"] = ArrayInfo((batch,), "int32")
        specs = [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in arguments.values()]
        outputs = jax.eval_shape(functools.partial(self._outputs, tuple(arguments)), self.weights, *specs)
        names = tuple(outputs)

        def encode(weights: Weights, cache: PlainCache, *arrays: Array) -> tuple[Any, ...]:
            outputs = self._outputs(tuple(arguments), weights, *arrays)
            return cache, *(outputs[name] for name in names)

        return {"encode": Entry(encode, arguments, names)}

    def _outputs(self, names: tuple[str, ...], weights: Weights, *arrays: Array) -> dict[str, Array]:
        model, bases = self._model(weights)
        inputs = dict(zip(names, arrays, strict=True))
        lengths, prompt_lengths = inputs.pop("lengths"), inputs.pop("prompt_lengths", None)
        return model.encode(inputs, lengths, attention=self.attention, bases=bases, prompt_lengths=prompt_lengths)


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


def _layers(cache: PlainCache) -> KVCache:
    return tuple(LayerCache(*arrays) for arrays in cache)


def _plain(cache: KVCache) -> PlainCache:
    return tuple(tuple(array for array in layer if array is not None) for layer in cache)
