"""A decoder's entries: what attention they have, and that what a cache held before counts for nothing."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer import kernels
from iceformer.attention import Attention, DecodeSelection, Exact, KVCache, LowRank, MeanPool, Plan, Sparq
from iceformer.deploy.entries import DecoderEntries

from ..few import few

CAPACITY, CHUNK = 256, 64
LENGTHS, SLOTS = (200, 131), (2, 0)
SMALL: dict[str, Any] = {
    "budget": 32, "query_block": 8, "key_block": 2, "sink": 4, "local": 4, "exact_last_block": False,
}  # fmt: skip
SELECTION: dict[str, Any] = {"budget": 24, "key_block": 4, "sink": 4, "local": 4}
ATTENTIONS = {
    "exact": Exact(),
    "mean_pool": iceformer.TwoStage(method=MeanPool(), **SMALL),
    "low_rank": iceformer.TwoStage(method=LowRank(rank=8), **SMALL),
}


@pytest.fixture(scope="module")
def entries(checkpoint: Any) -> DecoderEntries:
    """With projections for `low_rank`."""
    model = iceformer.load_model(checkpoint)
    config: Any = model.config
    rng, shape = np.random.default_rng(0), (config.num_key_value_heads, config.head_dim, 8)
    constants = tuple(
        {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in ("query_projection", "key_projection")}
        for _ in range(config.num_hidden_layers)
    )
    made = DecoderEntries.of(model, constants)
    assert isinstance(made, DecoderEntries)
    return made


def of_plan(entries: DecoderEntries, prompt: Attention, decode: Attention | None = None) -> DecoderEntries:
    """Entries with another plan."""
    return dataclasses.replace(entries, plan=Plan(prompt, decode or Exact()))


class Compiled:
    """Prefill and decode, compiled once, with the weights in place. Slot 1 of 3 is free."""

    def __init__(self, entries: DecoderEntries, page: int = 0) -> None:
        self.entries, self._page = entries, page
        functions = entries.functions(CAPACITY, CHUNK, batch=3, page=page)
        self._prefill, self._decode = (jax.jit(functions[name].function) for name in ("prefill", "decode"))
        # The pages of a slot lie anywhere.
        order = np.random.default_rng(2).permutation(3 * CAPACITY // page) if page else None
        self._table = () if order is None else (jnp.asarray(order.reshape(3, -1), jnp.int32),)

    def cache(self, held: float) -> KVCache:
        """That held one number everywhere."""
        # The largest int8 is where projections go that overflow.
        layers = self.entries.cache(CAPACITY, 3, "float32", self._page).layers
        return tuple(
            {name: jnp.full(x.shape, 127 if x.dtype == "int8" else held, x.dtype) for name, x in layer.items()}
            for layer in layers
        )

    def prefill(self, held: float) -> tuple[KVCache, np.ndarray]:
        """The cache after two prompts, which begin in turn, and the logits after their last tokens."""
        cache, logits = self.cache(held), np.zeros((len(LENGTHS), 0))
        prompts = np.random.default_rng(1).integers(3, 300, (2, CAPACITY))
        found = {}
        for start, row in itertools.product(range(0, CAPACITY, CHUNK), range(2)):
            if start >= LENGTHS[row]:
                continue
            tokens = np.where(np.arange(CAPACITY) < LENGTHS[row], prompts[row], 0)[None, start : start + CHUNK]
            numbers = (jnp.array([x], jnp.int32) for x in (SLOTS[row], start, LENGTHS[row]))
            arguments = jnp.asarray(tokens, jnp.int32), *numbers, *self._table
            cache, logits = self._prefill(self.entries.weights, cache, *arguments)
            found[row] = np.asarray(logits)[0]
        return cache, np.stack([found[0], found[1]])

    def decode(self, cache: KVCache) -> tuple[KVCache, np.ndarray]:
        """The cache and the logits after one more token of each row."""
        tokens, slot, offset = np.zeros(3, np.int32), np.full(3, -1, np.int32), np.full(3, 7, np.int32)
        for row, of_row in enumerate(SLOTS):
            tokens[of_row], slot[of_row], offset[of_row] = 5 + row, of_row, LENGTHS[row]
        cache, logits = self._decode(self.entries.weights, cache, tokens, slot, offset, *self._table)
        return cache, np.asarray(logits)[list(SLOTS)]


@pytest.mark.parametrize("page", few([0, 128], [0]))
@pytest.mark.parametrize("name", few(ATTENTIONS, ["low_rank"]))
def test_what_a_cache_held_before_counts_for_nothing(entries: DecoderEntries, name: str, page: int) -> None:
    with kernels.disabled():
        without_constants = DecoderEntries.of(entries._model(entries.weights)[0], None)
        assert isinstance(without_constants, DecoderEntries)
        chosen = entries if name == "low_rank" else without_constants
        compiled = Compiled(of_plan(chosen, ATTENTIONS[name]), page)
        cache, after_prompt = compiled.prefill(0.0)
        _, after_token = compiled.decode(cache)
        assert np.isfinite(after_prompt).all()
        assert np.isfinite(after_token).all()
        for held in (np.nan, np.inf):
            cache, found = compiled.prefill(held)
            np.testing.assert_array_equal(found, after_prompt)
            np.testing.assert_array_equal(compiled.decode(cache)[1], after_token)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(ATTENTIONS, ["low_rank"]))
def test_pages_give_what_whole_slots_give(entries: DecoderEntries, name: str) -> None:
    outputs = []
    for page in (0, 128):
        compiled = Compiled(of_plan(entries, ATTENTIONS[name], ATTENTIONS[name]), page)
        cache, after_prompt = compiled.prefill(np.nan)
        outputs.append([after_prompt, compiled.decode(cache)[1]])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)


def test_an_idle_row_writes_nothing(entries: DecoderEntries) -> None:
    decode = DecodeSelection(LowRank(rank=8), exact_layers=0, refresh=4, **{**SELECTION, "budget": 40})
    compiled = Compiled(of_plan(entries, ATTENTIONS["low_rank"], decode))
    before = compiled.cache(3.0)
    after, _ = compiled.decode(before)
    for was, now in zip(before, after, strict=True):
        for name, array in was.items():
            np.testing.assert_array_equal(now[name][1], array[1])
            assert not (now[name][0] == array[0]).all(), name


def test_decoding_takes_the_plans_decode(entries: DecoderEntries) -> None:
    """Whatever the prompt's attention was; the other one would give something else."""
    exact = Compiled(of_plan(entries, ATTENTIONS["low_rank"]))
    cache, _ = exact.prefill(0.0)
    _, found = exact.decode(cache)
    reference = of_plan(entries, ATTENTIONS["low_rank"], Exact(64, 64))
    np.testing.assert_allclose(found, Compiled(reference).decode(cache)[1], atol=1e-5)
    selecting = Compiled(of_plan(entries, ATTENTIONS["low_rank"], ATTENTIONS["low_rank"]))
    assert np.abs(selecting.decode(cache)[1] - found).max() > 1e-3


def test_the_first_layers_decode_exactly(entries: DecoderEntries) -> None:
    """What a layer makes of the new token shows in the next layer's keys."""
    prompt = ATTENTIONS["low_rank"]
    cache, _ = Compiled(of_plan(entries, prompt)).prefill(0.0)
    logits, keys = {}, {}
    for name, decode in {
        "exact": Exact(),
        **{layers: DecodeSelection(LowRank(rank=8), exact_layers=layers, **SELECTION) for layers in (0, 1, 2)},
    }.items():
        after, logits[name] = Compiled(of_plan(entries, prompt, decode)).decode(cache)
        keys[name] = np.stack([after[1]["key"][slot, :, length] for slot, length in zip(SLOTS, LENGTHS, strict=True)])
    np.testing.assert_allclose(logits[2], logits["exact"], atol=1e-5)
    np.testing.assert_allclose(keys[1], keys["exact"], atol=1e-5)
    assert np.abs(logits[1] - logits["exact"]).max() > 1e-3
    assert np.abs(keys[0] - keys["exact"]).max() > 1e-3


@pytest.mark.slow
def test_a_selections_index_is_kept_in_pages_and_slots_alike(entries: DecoderEntries) -> None:
    """With fields of every kind, in memory that held NaN."""
    decode = DecodeSelection(Sparq(rank=8), exact_layers=0, reallocate=True, **SELECTION)
    found = []
    for page in (0, 128):
        compiled = Compiled(of_plan(entries, ATTENTIONS["mean_pool"], decode), page)
        cache, _ = compiled.prefill(np.nan)
        assert cache[0].keys() == {"key", "value", "mean_key", "key_components", "value_sum"}
        found.append(compiled.decode(cache)[1])
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
