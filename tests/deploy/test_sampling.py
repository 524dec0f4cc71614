"""Sampling on the host, beside transformers' processors and beside formulas written out here."""

import math
import timeit
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from iceformer.deploy.sampling import Sampler, Sampling, TokenLogprobs, top_logprobs

from ..few import few

LARGE = 262144
PROMPT = np.array([1, 3, 3, 0], np.int32)


def random_logits(vocab: int, seed: int, ties: bool = False) -> NDArray[np.float32]:
    """Logits with the spread that a model's have; with `ties` only some values, so that many are equal."""
    logits = 3 * np.random.default_rng(seed).standard_normal(vocab)
    return (np.round(logits) if ties else logits).astype(np.float32)


def random_sampling(seed: int, vocab: int) -> Sampling:
    """Some of the options, each on in two of three."""
    draw = np.random.default_rng(seed)
    options: dict[str, Any] = {
        "top_k": int(draw.integers(1, 60)),
        "top_p": float(draw.uniform(0.05, 0.99)),
        "min_p": float(draw.uniform(0.001, 0.5)),
        "repetition_penalty": float(draw.uniform(0.5, 2.0)),
        "logit_bias": {int(id): float(draw.normal()) for id in draw.integers(0, vocab, 3)},
    }
    kept = {name: value for name, value in options.items() if draw.random() < 2 / 3}
    return Sampling(temperature=float(draw.uniform(0.2, 2.0)), **kept)


def theirs(sampling: Sampling, ids: NDArray[Any], logits: NDArray[np.float32], *, warp: bool = True) -> NDArray[Any]:
    """Logits after transformers' processors, and its warpers in float64, in the order of its `generate`."""
    processors, warpers = LogitsProcessorList(), LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[id], bias] for id, bias in sampling.logit_bias.items()]))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if warp:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            warpers.append(MinPLogitsWarper(sampling.min_p))
    before, scores = torch.from_numpy(ids[None].astype(np.int64)), torch.from_numpy(logits[None])
    processed: Any = processors(before, scores)  # pyright: ignore[reportArgumentType]
    return warpers(before, processed.double())[0].numpy()  # pyright: ignore[reportArgumentType]


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def lowest_of_equals(expected: NDArray[Any], before: NDArray[Any]) -> NDArray[Any]:
    """Where top-p keeps a part of equal logits, any in transformers, the lowest ids instead."""
    edge = expected[expected > -np.inf].min()
    equal = np.flatnonzero(before == edge)
    result = expected.copy()
    result[equal] = -np.inf
    result[equal[: (expected == edge).sum()]] = edge
    return result


def check_as_transformers(sampling: Sampling, written: list[int], logits: NDArray[np.float32]) -> None:
    sampler = Sampler(sampling, PROMPT, len(logits))
    for token in written:
        sampler.accept(token)
    ids, scores = sampler.candidates(logits)
    before = np.concatenate([PROMPT, np.array(written, np.int32)])
    unlimited = theirs(replace(sampling, top_k=0, top_p=1.0, min_p=0.0), before, logits)
    expected = lowest_of_equals(theirs(sampling, before, logits), unlimited)
    np.testing.assert_array_equal(ids[scores > -np.inf], np.flatnonzero(expected > -np.inf))
    np.testing.assert_allclose(softmax(scores), softmax(expected)[ids], rtol=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [5, 64, 1000, 50257])
@pytest.mark.parametrize("seed", few(range(12), range(2)))
def test_what_may_be_drawn_and_how_likely_is_as_in_transformers(seed: int, vocab: int, ties: bool) -> None:
    written = np.random.default_rng(seed).integers(0, vocab, seed).tolist()
    check_as_transformers(random_sampling(seed, vocab), written, random_logits(vocab, seed, ties))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 10**6},
        {"top_p": 0.3},
        {"top_p": 1e-300},
        {"top_p": 1 - 1e-12},
        {"min_p": 1.0},
        {"min_p": 0.5, "top_p": 0.6},
        {"repetition_penalty": 5.0},
        {"logit_bias": {2: -100.0, 4: 100.0}},
        {"logit_bias": {0: 50.0}, "repetition_penalty": 2.0, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize(
    "logits",
    [
        [2.0, 2.0, 2.0, 2.0, 2.0],
        [0.0, 1.0, 1.0, 1.0, -3.0],
        [-1.0, -2.0, -2.5, 0.0, -2.0],
        [60.0, -60.0, 0.0, 59.5, 1.0],
        [1.0, -np.inf, 1.5, -np.inf, -np.inf],
    ],
)
def test_edges_are_as_in_transformers(options: dict[str, Any], logits: list[float]) -> None:
    check_as_transformers(Sampling(temperature=0.7, **options), [2], np.array(logits, np.float32))


@pytest.mark.parametrize("seed", range(10))
def test_greedy_is_as_in_transformers(seed: int) -> None:
    """It ignores what only limits draws, and minds bias and penalty."""
    draws = random_sampling(seed, 100)
    sampling = Sampling(
        top_k=draws.top_k,
        top_p=draws.top_p,
        min_p=draws.min_p,
        repetition_penalty=draws.repetition_penalty,
        logit_bias=draws.logit_bias,
    )
    sampler, ids = Sampler(sampling, PROMPT, 100), PROMPT
    logits = random_logits(100, 1000 + seed, ties=True)
    for _ in range(20):
        token = sampler.choose(logits)
        assert token == theirs(sampling, ids, logits, warp=False).argmax()
        sampler.accept(token)
        ids = np.append(ids, token)


def test_presence_and_frequency_count_what_was_written_and_not_the_prompt() -> None:
    logits = np.array([1.0, 2.0, -3.0, 0.5, 0.0], np.float32)
    sampling = Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=-0.25)
    sampler = Sampler(sampling, PROMPT, 5)
    for token in (2, 1, 2, 2):
        sampler.accept(token)
    expected = logits - np.array([0, 0.5 - 0.25, 0.5 - 3 * 0.25, 0, 0])
    np.testing.assert_allclose(sampler.candidates(logits)[1], expected - expected.max(), atol=1e-6)


def test_bias_comes_before_the_penalty_on_repetition_and_that_before_the_one_on_presence() -> None:
    logits = np.array([1.0, 4.0, -1.0, 0.0, 0.0], np.float32)
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: -6.0, 0: 3.0})
    sampler = Sampler(sampling, PROMPT, 5)
    sampler.accept(1)
    expected = np.array([(1 + 3) / 2, (4 - 6) * 2 - 1, -1, 0, 0])
    np.testing.assert_allclose(sampler.candidates(logits)[1], expected - expected.max(), atol=1e-6)


def test_logits_are_not_changed() -> None:
    logits = random_logits(50, 0)
    logits.setflags(write=False)
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 9.0})
        Sampler(sampling, PROMPT, 50).choose(logits)


@pytest.mark.parametrize("temperature", [0.0, 1e-320])
def test_greedy_takes_the_first_of_a_tie(temperature: float) -> None:
    """Also at a temperature that is too small to divide by."""
    logits = np.array([0.0, 2.0, 2.0, -1.0], np.float32)
    assert Sampler(Sampling(temperature=temperature), PROMPT, 4).choose(logits) == 1


@pytest.mark.parametrize("temperature", [2.3e-308, 1e-30])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature: float) -> None:
    logits = np.array([0.0, 2.0, 1.9999999, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, min_p=0.1), PROMPT, 4)
    assert {sampler.choose(logits) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.4, "repetition_penalty": 1.3, "logit_bias": {4: 33.0}},
    ],
)
def test_draws_follow_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    """8000 draws: each frequency lies within five standard deviations of its probability."""
    logits = np.array([1.0, 0.0, -1.0, 2.5, -30.0], np.float32)
    sampling = Sampling(**options)
    probabilities = softmax(theirs(sampling, PROMPT, logits))
    sampler = Sampler(sampling, PROMPT, 5)
    draws = np.bincount([sampler.choose(logits) for _ in range(8000)], minlength=5) / 8000
    deviation = np.sqrt(probabilities * (1 - probabilities) / 8000)
    assert (np.abs(draws - probabilities) <= 5 * deviation + 1e-9).all()


def test_the_seed_decides_and_other_requests_do_not() -> None:
    steps = [random_logits(1000, seed) for seed in range(20)]

    def text(seed: int, beside: Sampler | None = None) -> list[int]:
        sampler, written = Sampler(Sampling(temperature=1.0, top_k=50, seed=seed), PROMPT, 1000), []
        for logits in steps:
            if beside is not None:
                beside.accept(beside.choose(logits))
            written.append(sampler.choose(logits))
            sampler.accept(written[-1])
        return written

    other = Sampler(Sampling(temperature=1.0, frequency_penalty=1.0, seed=1), PROMPT, 1000)
    assert text(1) == text(1, beside=other)
    assert text(1) != text(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits", [[1.0, np.nan, 2.0, 0.0], [0.0, np.inf, 1.0, 0.0], [-np.inf] * 4], ids=["nan", "inf", "nothing"]
)
def test_logits_of_a_broken_model_are_refused(logits: list[float], temperature: float) -> None:
    given = np.array(logits, np.float32)
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=1.5), PROMPT, 4)
    with pytest.raises(RuntimeError, match=r"the largest logit is -?(nan|inf), expected a finite number"):
        sampler.choose(given)
    with pytest.raises(RuntimeError, match="the largest logit is"):
        top_logprobs(given, 0, 1)


def test_extreme_penalties_give_large_logits_and_no_infinite_ones() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2e-38), PROMPT, 5)
    assert sampler.choose(np.array([-50.0, 50.0, 90.0, 0.0, 0.0], np.float32)) == 1
    sampler = Sampler(Sampling(temperature=1.0, repetition_penalty=3e38), PROMPT, 4)
    assert sampler.choose(np.full(4, -9.0, np.float32)) == 2
    sampler.accept(2)
    assert {sampler.choose(np.full(4, -9.0, np.float32)) for _ in range(40)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature is -1, expected 0 \(greedy\) or a positive number"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": -1}, "top_k is -1, expected an integer of at least 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": False}, "top_k is False"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"min_p": -0.1}, r"min_p is -0.1, expected a number from 0 \(off\) to 1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a positive number, 1 for none"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, expected a number from -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1, expected a number from -2 to 2"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"logit_bias": [1]}, "logit_bias is a list, expected a mapping of token ids to numbers"),
        ({"logit_bias": {-1: 1.0}}, "a token id of logit_bias is -1, expected an integer of at least 0"),
        ({"logit_bias": {"1": 1.0}}, "a token id of logit_bias is '1'"),
        ({"logit_bias": {7: math.inf}}, "logit_bias of token 7 is inf, expected a finite number"),
        ({"logit_bias": {7: 1e39}}, r"logit_bias of token 7 is 1e\+39"),
        ({"logit_bias": {7: True}}, "logit_bias of token 7 is True"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_refuses(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # callers outside of tests have no such checks
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**options)


def test_a_bias_must_be_in_the_vocabulary() -> None:
    Sampling().check_vocabulary(1)
    sampling = Sampling(logit_bias={3: 1.0, 99: -1.0})
    sampling.check_vocabulary(100)
    with pytest.raises(ValueError, match="logit_bias has token id 99, expected ids below 99"):
        sampling.check_vocabulary(99)


def test_options_are_values_that_nobody_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {1: 2}
    sampling = Sampling(temperature=1, logit_bias=given)
    given[1] = 3
    same = Sampling(temperature=np.float32(1), logit_bias={np.int64(1): 2.0})  # pyright: ignore[reportArgumentType]
    assert sampling == same
    assert hash(sampling) == hash(same)
    assert isinstance(same.temperature, float)
    assert sampling != Sampling(temperature=1, logit_bias=given)
    with pytest.raises(TypeError):
        sampling.logit_bias[1] = 3  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("vocab", [5, 300, LARGE])
@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_top_logprobs_are_those_of_the_softmax(vocab: int, n: int) -> None:
    logits = random_logits(vocab, vocab + n) + np.float32(500)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    chosen = vocab // 2
    found = top_logprobs(logits, chosen, n)
    assert found.logprob == pytest.approx(expected[chosen].item(), abs=1e-10)
    values, ids = expected.topk(min(n, vocab))
    assert [id for id, _ in found.top] == ids.tolist()
    np.testing.assert_allclose([logprob for _, logprob in found.top], values, atol=1e-10)


def test_top_logprobs_name_the_lowest_ids_of_equals() -> None:
    logits = np.array([-200.0, 7.0, 7.0, -np.inf, 7.0], np.float32)
    found = top_logprobs(logits, 4, 2)
    assert [id for id, _ in found.top] == [1, 2]
    assert [found.logprob, *(logprob for _, logprob in found.top)] == pytest.approx([-math.log(3)] * 3)
    assert top_logprobs(logits, 3, 0) == TokenLogprobs(-math.inf, ())


@pytest.mark.parametrize("n", [-1, 21])
def test_top_logprobs_refuses_another_number(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}, expected 0 to 20"):
        top_logprobs(np.zeros(30, np.float32), 0, n)


def seconds(sampling: Sampling) -> float:
    """Least time of a token of a large vocabulary."""
    sampler, logits = Sampler(sampling, PROMPT, LARGE), random_logits(LARGE, 0)
    return min(timeit.repeat(lambda: sampler.choose(logits), number=1, repeat=30))


def test_greedy_costs_one_argmax() -> None:
    logits = random_logits(LARGE, 0)
    argmax = min(timeit.repeat(lambda: np.argmax(logits), number=1, repeat=30))
    assert seconds(Sampling()) < 2 * argmax + 2e-5


def test_top_k_draws_for_its_few_tokens_only() -> None:
    assert seconds(Sampling(temperature=1.0, top_k=50)) < seconds(Sampling(temperature=1.0)) / 2
