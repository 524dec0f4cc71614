"""Predictions compared with exact attention's: against plain numpy, and means that add up."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer.deploy.fidelity import BINS, Fidelity, binned, comparison, first_of_last_quarter, last_quarter
from iceformer.deploy.reader import Reader
from iceformer.model.rounding import round_weights

from ..few import few


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return iceformer.load_model(tiny_checkpoint)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("tokens", [70, 256, 300])
@pytest.mark.parametrize("form", ["same", "int8"])
def test_comparison_is_what_numpy_computes(model: Any, tokens: int, form: str) -> None:
    other = model if form == "same" else round_weights(model, form)
    rng = np.random.default_rng(tokens)
    hidden = rng.standard_normal((tokens, 48)).astype(np.float32)
    changed = (hidden + 0.2 * rng.standard_normal(hidden.shape)).astype(np.float32)
    ids = rng.integers(0, 288, tokens).astype(np.int32)
    found = comparison(model, other)(jnp.asarray(hidden), jnp.asarray(changed), ids)
    p, q = (log_softmax(np.asarray(m.logits(jnp.asarray(x))))[:-1] for m, x in ((model, hidden), (other, changed)))
    every = np.arange(tokens - 1)
    np.testing.assert_allclose(found["exact_logprob"], p[every, ids[1:]], atol=1e-4)
    np.testing.assert_allclose(found["logprob"], q[every, ids[1:]], atol=1e-4)
    np.testing.assert_array_equal(found["agreement"], p.argmax(axis=1) == q.argmax(axis=1))
    np.testing.assert_allclose(found["kl"], (np.exp(p) * (p - q)).sum(axis=1), atol=1e-4)
    assert found["kl"].min() > -1e-4


@pytest.mark.parametrize("tokens", [64, 1000, 1024])
def test_means_of_stretches_add_up(tokens: int) -> None:
    rng = np.random.default_rng(0)
    predictions = {name: rng.standard_normal(tokens - 1) for name in ("exact_logprob", "logprob", "agreement", "kl")}
    bins = binned(predictions, tokens)
    assert len(bins) == BINS
    whole, end = Fidelity.merged(bins), last_quarter(bins)
    start = first_of_last_quarter(tokens)
    at_once = Fidelity.of({name: values[start:] for name, values in predictions.items()})
    assert asdict(at_once) == pytest.approx(asdict(end))
    assert whole.positions == tokens - 1
    for name, values in predictions.items():
        assert asdict(whole)[name] == pytest.approx(values.mean())
        assert asdict(end)[name] == pytest.approx(values[tokens * 3 // 4 :].mean())
    assert whole.loss == pytest.approx(predictions["exact_logprob"].mean() - predictions["logprob"].mean())
    assert whole.perplexity_ratio == pytest.approx(np.exp(whole.loss))
    with pytest.raises(ValueError, match="no positions"):
        Fidelity.merged([])


@pytest.mark.parametrize("kv_dtype", few(["float32", "int8"], ["int8"]))
def test_a_reader_reads_as_the_model_does(model: Any, kv_dtype: str) -> None:
    ids = np.random.default_rng(1).integers(0, 288, 200).astype(np.int32)
    reader = Reader(model, iceformer.Exact(), None, capacity=256, chunk=64, kv_dtype=kv_dtype)
    hidden, seconds = reader.read(ids)
    assert seconds > 0
    difference = np.abs(np.asarray(model.logits(hidden)) - np.asarray(model(jnp.asarray(ids[None]))[0])).max()
    assert (difference < 1e-3) == (kv_dtype == "float32")
    assert difference < 1
