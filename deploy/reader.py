"""Reads prompts through a model as a session does, chunk by chunk into a KV cache, and keeps the hidden states.

The hidden states stand behind the final norm: the output layer turns them into logits, a few positions at a time.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from ..attention import Attention, Plan, Rows, TwoStage
from ..attention.cache import KVCache
from ..model.decoder import CausalLM
from ..model.self_attention import LayerConstants
from .entries import DecoderEntries, score_block, score_positions

PIECE, TAIL = 256, 512
"""Tokens of the calls that read a context's end, and of those that read what stands behind it."""


class Reader:
    """A model with one attention and one format of keys and values, with room for one prompt.

    Attributes:
        model: the model.
        exact_last_block: whether its attention treats the end of a prompt differently.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: Attention,
        constants: LayerConstants | None,
        *,
        capacity: int,
        chunk: int,
        kv_dtype: str,
    ) -> None:
        """
        Args:
            model: the model.
            attention: of prompts, in the layers that see the whole sequence.
            constants: what the attention was calibrated to.
            capacity: tokens of the longest prompt, a multiple of `chunk`.
            chunk: tokens of one call.
            kv_dtype: of the KV cache.
        """
        self.model, self._chunk, self._constants = model, chunk, constants
        self.exact_last_block = isinstance(attention, TwoStage) and attention.exact_last_block
        plan = Plan(attention)
        self._layers = replace(DecoderEntries.of(model, constants), plan=plan).cache(capacity, 1, kv_dtype, 0).layers
        self._graph, self._state = nnx.split(model)
        self._read = jax.jit(partial(self._hidden_states, plan), donate_argnums=2)
        self._score_known = jax.jit(partial(self._score, plan))
        self._score_later = jax.jit(partial(self._score, Plan(_without_exact_last_block(attention))))

    def warm_up(self) -> None:
        """Compiles, and touches the memory of cache and weights."""
        self.read(np.zeros(self._chunk, np.int32))

    def read(self, ids: Int32[np.ndarray, " tokens"]) -> tuple[Float[Array, "tokens hidden"], float]:
        """Hidden states of a whole prompt, and the seconds that its layers took."""
        padded = np.pad(ids, (0, -ids.size % self._chunk)).reshape(-1, self._chunk)
        cache = self._empty()
        jax.block_until_ready(cache)
        start, parts = time.perf_counter(), []
        for number, tokens in enumerate(padded):
            hidden, cache = self._call(self._read, cache, tokens, number * self._chunk, ids.size)
            parts.append(hidden)
        jax.block_until_ready(parts)
        seconds = time.perf_counter() - start
        return jnp.concatenate(parts)[: ids.size], seconds

    def prefill(self, ids: Int32[np.ndarray, " tokens"]) -> tuple[KVCache, int]:
        """The cache of a context's whole pieces, and how many tokens they are."""
        whole = ids.size // PIECE * PIECE
        cache, offset = self._empty(), 0
        while offset < whole:
            size = self._chunk if offset + self._chunk <= whole else PIECE
            # The length says that more follows: none of these tokens are a prompt's last.
            _, cache = self._call(self._read, cache, ids[offset : offset + size], offset, whole + TAIL)
            offset += size
        return cache, whole

    def score(
        self, cache: KVCache, offset: int, ids: Int32[np.ndarray, " tokens"], *, known: bool
    ) -> tuple[Float[np.ndarray, " predicted"], Int32[np.ndarray, " predicted"]]:
        """Log-probabilities of at most `TAIL` tokens but the first behind what the cache holds, and the most likely
        tokens in their places. The cache stays as it is.

        Args:
            cache: from `prefill`.
            offset: tokens in it.
            ids: of the rest of the prompt.
            known: whether the rest ends the prompt, so that its last block may be exact.
        """
        score = self._score_known if known else self._score_later
        padded, targets = np.pad(ids, (0, TAIL - ids.size)), np.pad(ids[1:], (0, TAIL + 1 - ids.size))
        logprobs, argmax = self._call(score, cache, padded, offset, offset + ids.size, targets)
        return np.asarray(logprobs)[: ids.size - 1], np.asarray(argmax)[: ids.size - 1]

    def _score(
        self, plan: Plan, state: Any, constants: Any, cache: KVCache, *arrays: Array
    ) -> tuple[Float[Array, " tail"], Int[Array, " tail"]]:
        tokens, offset, length, targets = arrays
        hidden, _ = self._hidden_states(plan, state, constants, cache, tokens, offset, length)
        return score_positions(nnx.merge(self._graph, state), hidden, targets, score_block(TAIL))

    def _hidden_states(
        self, plan: Plan, state: Any, constants: Any, cache: KVCache, tokens: Array, offset: Array, length: Array
    ) -> tuple[Float[Array, "chunk hidden"], KVCache | None]:
        rows = Rows(jnp.zeros(1, jnp.int32), offset, length)
        model = nnx.merge(self._graph, state)
        hidden, extended = model.hidden_states(tokens[None], rows, plan=plan, cache=cache, constants=constants)
        return hidden[0], extended

    def _call(
        self, function: Any, cache: KVCache, tokens: Int[np.ndarray, " chunk"], offset: int, length: int, *more: Any
    ) -> Any:
        at = (np.array([offset], np.int32), np.array([length], np.int32))
        return function(self._state, self._constants, cache, tokens, *at, *more)

    def _empty(self) -> KVCache:
        return tuple(
            {name: jnp.zeros(array.shape, array.dtype) for name, array in layer.items()} for layer in self._layers
        )


def _without_exact_last_block(attention: Attention) -> Attention:
    return replace(attention, exact_last_block=False) if isinstance(attention, TwoStage) else attention
