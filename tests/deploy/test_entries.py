"""A decoder's entries: what attention they have, and that what a cache held before counts for nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer import kernels
from iceformer.attention import Exact, LowRank, MeanPool
from iceformer.attention.cache import LayerCache
from iceformer.deploy.entries import DecoderEntries, PlainCache

from ..model.cases import few

CAPACITY, CHUNK, LENGTHS = 120, 40, (100, 61)
SMALL: dict[str, Any] = {
    "budget": 32, "query_block": 8, "key_block": 2, "sink": 4, "local": 4, "exact_last_block": False,
}  # fmt: skip
ATTENTIONS = {
    "dense": Exact(),
    "mean_pool": iceformer.TwoStage(method=MeanPool(), **SMALL),
    "low_rank": iceformer.TwoStage(method=LowRank(rank=8), **SMALL),
}


@pytest.fixture(scope="module")
def entries(checkpoint: Any) -> DecoderEntries:
    """With projections for `low_rank`."""
    model = iceformer.load_model(checkpoint)
    config: Any = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, 2, config.head_dim, 8)
    bases = tuple(jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32))
    made = DecoderEntries.of(model, bases)
    assert isinstance(made, DecoderEntries)
    return made


class Compiled:
    """Prefill and decode, compiled once, with the weights in place."""

    def __init__(self, entries: DecoderEntries) -> None:
        functions = entries.functions(CAPACITY, CHUNK, batch=2)
        self.entries = entries
        self._prefill, self._decode = (jax.jit(functions[name].function) for name in ("prefill", "decode"))

    def prefill(self, held: float) -> tuple[PlainCache, np.ndarray]:
        """The cache after two prompts, where it held one number everywhere, and the logits after their last chunk."""
        # The largest int8 is where projections go that overflow.
        layers = self.entries.cache(CAPACITY, 2, "float32").layers
        cache = tuple(tuple(jnp.full(x.shape, 127 if x.dtype == "int8" else held, x.dtype) for x in y) for y in layers)
        tokens = np.random.default_rng(1).integers(3, 300, (2, CAPACITY))
        tokens = jnp.asarray(np.where(np.arange(CAPACITY) < np.array(LENGTHS)[:, None], tokens, 0), jnp.int32)
        logits = np.zeros(())
        for start in range(0, CAPACITY, CHUNK):
            arguments = tokens[:, start : start + CHUNK], jnp.int32(start), jnp.array(LENGTHS, jnp.int32)
            cache, logits = self._prefill(self.entries.weights, cache, *arguments)
        return cache, np.asarray(logits)

    def decode(self, cache: PlainCache) -> np.ndarray:
        """The logits after one more token of each row."""
        arguments = jnp.array([5, 6], jnp.int32), jnp.array(LENGTHS, jnp.int32)
        return np.asarray(self._decode(self.entries.weights, cache, *arguments)[1])


@pytest.mark.parametrize("name", few(ATTENTIONS, ["low_rank"]))
def test_what_a_cache_held_before_counts_for_nothing(entries: DecoderEntries, name: str) -> None:
    with kernels.disabled():
        without_basis = DecoderEntries.of(entries._model(entries.weights)[0], None)
        assert isinstance(without_basis, DecoderEntries)
        chosen = entries if name == "low_rank" else without_basis
        compiled = Compiled(dataclasses.replace(chosen, attention=ATTENTIONS[name]))
        cache, after_prompt = compiled.prefill(0.0)
        after_token = compiled.decode(cache)
        assert np.isfinite(after_prompt).all()
        assert np.isfinite(after_token).all()
        for held in (np.nan, np.inf):
            cache, found = compiled.prefill(held)
            # The second row ends before the last chunk.
            np.testing.assert_array_equal(found[0], after_prompt[0])
            np.testing.assert_array_equal(compiled.decode(cache), after_token)


def test_a_new_token_attends_exactly_whatever_the_prompt_did(entries: DecoderEntries) -> None:
    two_stage = dataclasses.replace(entries, attention=ATTENTIONS["low_rank"])
    compiled = Compiled(two_stage)
    cache, _ = compiled.prefill(0.0)
    exact = Compiled(dataclasses.replace(entries, attention=Exact())).decode(cache)
    np.testing.assert_array_equal(compiled.decode(cache), exact)
    # The prompt's attention would give something else.
    model, bases = entries._model(entries.weights)
    positions = jnp.array(LENGTHS, jnp.int32)
    hidden, _ = model.hidden_states(
        jnp.array([[5], [6]], jnp.int32),
        offset=positions,
        lengths=positions + 1,
        cache=tuple(LayerCache(*layer) for layer in cache),
        attention=two_stage.attention,
        bases=bases,
    )
    assert np.abs(model.logits(hidden[:, 0]) - exact).max() > 1e-3
