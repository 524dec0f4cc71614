"""The three functions that are compiled for each bucket: prefill, decode and score.

All take the weights as a flat tuple in the order of their names and the KV cache as plain tuples, and are pure: the
cache that goes in is donated, the one that comes out takes its place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ..attention import AttentionConfig, Dense
from ..attention.cache import KVCache, LayerCache
from ..model.decoder import Bases

PlainCache = tuple[tuple[Array, ...], ...]
Weights = tuple[Array, ...]

# Positions whose logits [positions, vocab] are held at once in `score`.
SCORE_BLOCK = 256
_BASES = "bases."


@dataclass(frozen=True)
class Entries:
    """A model taken apart into named arrays, and the functions over them.

    Attributes:
        names: of the weights, sorted; calibrated bases are among them as `bases.0`, `bases.1`, ...
        weights: the arrays, in the order of `names`.
        rebuild: the module from its parameters by name.
        attention: of the prompt, exact until it is replaced; `decode` is always exact.
    """

    names: tuple[str, ...]
    weights: Weights
    rebuild: Callable[[Mapping[str, Array]], Any]
    attention: AttentionConfig

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

    def _model(self, weights: Weights) -> tuple[Any, Bases | None]:
        named = dict(zip(self.names, weights, strict=True))
        model = self.rebuild(named)
        bases = tuple(named.get(f"{_BASES}{layer}") for layer in range(model.config.num_hidden_layers))
        return model, bases if any(basis is not None for basis in bases) else None


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
