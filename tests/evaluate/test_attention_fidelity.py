"""Mass, recall, error and keys of a selection: against plain numpy, and on a model's own queries and keys."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer.attention import Exact, LowRank, Mask, MeanPool, PageBound, Rows, TwoStage
from iceformer.evaluate import selected_keys as module
from iceformer.evaluate.attention_fidelity import TOP_KEYS, measure_layer, sampled_blocks
from iceformer.evaluate.attention_recording import record_layers
from iceformer.evaluate.selected_keys import selected_keys

from ..attention.reference import random_inputs
from ..few import few

TOKENS, HEAD_DIM, BLOCK = 160, 16, 8
SMALL: dict[str, Any] = {"budget": 40, "query_block": BLOCK, "key_block": 4, "sink": 4, "local": 4}
CONFIGS: dict[str, TwoStage] = {
    "low_rank": TwoStage(method=LowRank(rank=4), **SMALL),
    "mean_pool": TwoStage(method=MeanPool(), **SMALL),
    "page_bound": TwoStage(method=PageBound(), **SMALL),
}
STARTS = (56, 96, 144)


@pytest.fixture(scope="module")
def inputs() -> Any:
    """Three blocks of queries, and keys and values of one row."""
    query, key, value = random_inputs(0, 1, 4, 2, TOKENS, TOKENS, HEAD_DIM)
    query *= 2
    return np.concatenate([query[:, :, start : start + BLOCK] for start in STARTS]), key, value


def constants_of(config: TwoStage) -> dict[str, Any]:
    query, key, _ = random_inputs(1, 1, 4, 2, 64, 64, HEAD_DIM)
    return {name: jnp.asarray(x) for name, x in config.calibrate(query[0], key[0]).items()}


def rows() -> Rows:
    return Rows(jnp.zeros(3, jnp.int32), jnp.asarray(STARTS, jnp.int32), jnp.full(3, TOKENS, jnp.int32))


def logits_of(query: np.ndarray, key: np.ndarray, block: int, head: int) -> np.ndarray:
    """[queries, tokens] of one query head, keys behind the query as -inf."""
    logits = query[block, head].astype(np.float64) @ key[0, head // 2].T.astype(np.float64) / np.sqrt(HEAD_DIM)
    seen = np.arange(TOKENS) <= STARTS[block] + np.arange(BLOCK)[:, None]
    return np.where(seen, logits, -np.inf)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_exact_attention_selects_all_that_a_block_sees(inputs: Any) -> None:
    query, key, _ = inputs
    selected = np.asarray(selected_keys(Exact(), jnp.asarray(query), jnp.asarray(key), rows(), Mask(), {}))
    for block, start in enumerate(STARTS):
        assert (selected[block] == (np.arange(TOKENS) < start + BLOCK)).all()


@pytest.mark.parametrize("name", few(CONFIGS, ["low_rank"]))
def test_the_selection_explains_the_output(inputs: Any, name: str) -> None:
    query, key, value = inputs
    config = CONFIGS[name]
    arrays = (jnp.asarray(x) for x in inputs)
    figures = measure_layer(config, Mask(), *arrays, jnp.asarray(STARTS, jnp.int32), constants_of(config))
    selected = np.asarray(
        selected_keys(config, jnp.asarray(query), jnp.asarray(key), rows(), Mask(), constants_of(config))
    )
    np.testing.assert_array_equal(figures.keys, selected.sum(axis=2))
    assert (selected.sum(axis=2) == config.budget).all()
    for block, head in np.ndindex(3, 4):
        kept, logits = selected[block, head], logits_of(query, key, block, head)
        weights, values = softmax(logits), value[0, head // 2]
        best = [np.argsort(-row)[: min(TOP_KEYS, int(np.isfinite(row).sum()))] for row in logits]
        exact = weights @ values
        difference = softmax(np.where(kept, logits, -np.inf)) @ values - exact
        error = np.linalg.norm(difference, axis=1) / np.linalg.norm(exact, axis=1)
        assert figures.mass[block, head] == pytest.approx((weights * kept).sum(axis=1).mean(), abs=1e-4)
        assert figures.recall[block, head] == pytest.approx(np.mean([kept[keys].mean() for keys in best]), abs=1e-4)
        assert figures.error[block, head] == pytest.approx(error.mean(), rel=1e-3)


def test_what_stands_in_for_keys_selects_none(inputs: Any) -> None:
    query, key, _ = inputs
    plain, compensated = (
        selected_keys(config, jnp.asarray(query), jnp.asarray(key), rows(), Mask(), {})
        for config in (CONFIGS["mean_pool"], replace(CONFIGS["mean_pool"], compensation="block_mean"))
    )
    np.testing.assert_array_equal(plain, compensated)


def test_keys_are_read_off_in_parts(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = inputs
    config = CONFIGS["mean_pool"]
    arguments = (config, jnp.asarray(query), jnp.asarray(key), rows(), Mask(), {})
    whole = selected_keys(*arguments)
    monkeypatch.setattr(module, "_COLUMNS", 48)
    np.testing.assert_array_equal(selected_keys(*arguments), whole)


def test_blocks_are_spread_over_those_that_select() -> None:
    attentions = [TwoStage(budget=1024), TwoStage(budget=512, query_block=64)]
    assert sampled_blocks(attentions, 4096, 3) == (1024, 2432, 3840)
    assert sampled_blocks(attentions, 1280, 3) == (1024,)
    assert sampled_blocks(attentions, 1024, 3) == ()


def test_layers_are_recorded_as_attention_takes_them(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = iceformer.load_model(tiny_checkpoint)
    ids = np.random.default_rng(0).integers(0, 288, 96).astype(np.int32)
    expected = model.queries_and_keys(jnp.asarray(ids[None]), jnp.array([96], jnp.int32))
    monkeypatch.setattr("iceformer.evaluate.attention_recording._BYTES", 1)
    found = list(record_layers(model, ids, (16, 64), 8, (0, 1)))
    assert [each.layer for each in found] == [0, 1]
    for each, (query, key) in zip(found, expected, strict=True):
        np.testing.assert_allclose(each.query[0], query[0, :, 16:24], atol=1e-4)
        np.testing.assert_allclose(each.query[1], query[0, :, 64:72], atol=1e-4)
        np.testing.assert_allclose(each.key, key, atol=1e-4)
        assert each.value.shape == key.shape
        assert each.mask.causal
