"""Scores and generated tokens of a session against transformers, and what it refuses."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

import iceformer
from iceformer.deploy.session import Session

from .conftest import EOS, TEXT, TWO_STAGE, VOCABULARY


def random_ids(length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length)


def expected_score(model: LlamaForCausalLM, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Log-probabilities and argmax by a full log-softmax in torch."""
    with torch.no_grad():
        logprobs = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1).numpy()
    return logprobs[np.arange(len(ids) - 1), ids[1:]], logprobs.argmax(-1)


def greedy(model: LlamaForCausalLM, ids: NDArray[np.int64], max_new_tokens: int) -> list[int]:
    prompt = torch.tensor(ids)[None]
    out: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=[EOS, 3]
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 128])
def test_score_equals_transformers(exact_session: Session, reference: LlamaForCausalLM, length: int) -> None:
    ids = random_ids(length, seed=length)
    score = exact_session.score(ids)
    logprobs, argmax = expected_score(reference, ids)
    assert (score.logprobs.dtype, score.argmax.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-3)
    np.testing.assert_array_equal(score.argmax, argmax)


def test_score_of_a_ragged_list(two_stage_session: Session, reference: LlamaForCausalLM) -> None:
    """More rows than the batch of 2, all within the budget, so that two-stage attention is exact."""
    rows = [random_ids(length, seed=length) for length in (20, 1, 32, 7, 29)]
    scores = two_stage_session.score(rows)
    assert len(scores) == len(scores.logprobs) == len(scores.argmax) == 5
    for score, ids in zip(scores, rows, strict=True):
        logprobs, argmax = expected_score(reference, ids)
        np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-3)
        np.testing.assert_array_equal(score.argmax, argmax)


def test_two_stage_score_equals_the_model_called_directly(two_stage_session: Session, checkpoint: Path) -> None:
    """The chunked, cached, ahead-of-time path against one call of the NNX module over the whole sequence."""
    ids = random_ids(101)
    model = iceformer.load_model(checkpoint)
    logits = jax.jit(lambda tokens: model(tokens, attention=TWO_STAGE))(jax.numpy.asarray(ids[None]))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    score = two_stage_session.score([ids, random_ids(17)])[0]
    np.testing.assert_allclose(score.logprobs, logprobs[np.arange(100), ids[1:]], atol=1e-3)
    np.testing.assert_array_equal(score.argmax, logprobs.argmax(-1))


def test_two_stage_differs_from_exact(two_stage_session: Session, reference: LlamaForCausalLM) -> None:
    ids = random_ids(128)
    difference = np.abs(two_stage_session.score(ids).logprobs - expected_score(reference, ids)[0])
    assert difference.max() > 1e-3


@pytest.mark.parametrize("length", [1, 32, 45, 60])
def test_greedy_ids_equal_transformers(exact_session: Session, reference: LlamaForCausalLM, length: int) -> None:
    ids = random_ids(length, seed=100 + length)
    generation = exact_session.generate(ids, max_new_tokens=12)
    assert generation.ids.tolist() == greedy(reference, ids, 12)
    assert generation.prompt_tokens == length


def test_generate_in_a_batch_artifact(two_stage_session: Session, reference: LlamaForCausalLM) -> None:
    ids = random_ids(20)
    assert two_stage_session.generate(ids, max_new_tokens=8).ids.tolist() == greedy(reference, ids, 8)


def test_generate_beyond_the_budget_in_a_batch_artifact(two_stage_session: Session) -> None:
    """A prompt of 97 tokens with the 6 after it has the same two query blocks at its end, which attend exactly, as new
    tokens do: so `score` makes the choices that `generate` makes."""
    assert two_stage_session.info.batch == 2
    ids = random_ids(97, seed=3)
    generation = two_stage_session.generate(ids, max_new_tokens=7)
    score = two_stage_session.score(np.concatenate([ids, generation.ids[:-1]]))
    assert generation.finish_reason == "length"
    assert len(set(generation.ids.tolist())) > 1
    np.testing.assert_array_equal(score.argmax[96:], generation.ids)


def test_text_in_and_out(exact_session: Session) -> None:
    generation = exact_session.generate("Once upon a time", max_new_tokens=5)
    ids = exact_session.tokenize("Once upon a time")
    assert ids[0] == 1
    assert generation.prompt_tokens == len(ids)
    np.testing.assert_array_equal(generation.ids, exact_session.generate(ids, max_new_tokens=5).ids)
    assert generation.text == exact_session.detokenize(generation.ids)
    assert exact_session.detokenize(exact_session.tokenize(TEXT)) == TEXT


def test_stops_at_every_eos_id(exact_session: Session) -> None:
    """Both ids of generation_config.json end a text; a high temperature reaches them soon."""
    runs = [exact_session.generate([5], 60, temperature=50.0, seed=seed) for seed in range(40)]
    stopped = [run for run in runs if run.finish_reason == "stop"]
    assert {int(run.ids[-1]) for run in stopped} == {EOS, 3}
    assert all(not {EOS, 3} & set(run.ids[:-1].tolist()) for run in runs)
    assert all(len(run.ids) == 60 for run in runs if run.finish_reason == "length")


def test_seed_decides_the_draw(exact_session: Session) -> None:
    first, again, other = (exact_session.generate([5, 6], 10, temperature=1.0, seed=seed).ids for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_ends_when_the_largest_bucket_is_full(exact_session: Session, reference: LlamaForCausalLM) -> None:
    ids = random_ids(126)
    generation = exact_session.generate(ids, max_new_tokens=50)
    assert generation.finish_reason == "capacity"
    assert generation.ids.tolist() == greedy(reference, ids, 3)


@pytest.mark.parametrize(
    ("length", "max_new_tokens", "reason"),
    [(128, 1, "length"), (128, 9, "capacity"), (64, 1, "length"), (64, 2, "length")],
)
def test_a_prompt_as_long_as_a_bucket(
    exact_session: Session, reference: LlamaForCausalLM, length: int, max_new_tokens: int, reason: str
) -> None:
    ids = random_ids(length, seed=7)
    generation = exact_session.generate(ids, max_new_tokens)
    assert generation.finish_reason == reason
    assert generation.ids.tolist() == greedy(reference, ids, 1 if length == 128 else max_new_tokens)


def test_a_prompt_as_long_as_the_bucket_beyond_the_budget(two_stage_session: Session) -> None:
    ids = random_ids(128, seed=8)
    generation = two_stage_session.generate(ids, 9)
    assert generation.finish_reason == "capacity"
    np.testing.assert_array_equal(generation.ids, two_stage_session.score(ids).argmax[-1:])


def test_calls_of_several_threads_do_not_meet(exact_session: Session, two_stage_session: Session) -> None:
    """Those of one session share its caches, and those of two sessions XLA's threads."""

    def scores(session: Session, length: int) -> Callable[[], NDArray[Any]]:
        return lambda: session.score(random_ids(length, seed=length)).logprobs

    def tokens(session: Session, length: int) -> Callable[[], NDArray[Any]]:
        return lambda: session.generate(random_ids(length, seed=length), 6).ids

    calls = [
        call(session, length)
        for session in (exact_session, two_stage_session)
        for call, length in ((scores, 90), (tokens, 97), (scores, 40), (tokens, 20))
    ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        rounds = [[pool.submit(call) for call in calls] for _ in range(5)]
        for futures in rounds:
            for future, expected in zip(futures, alone, strict=True):
                np.testing.assert_array_equal(future.result(timeout=120), expected)


def test_progress_reaches_the_end(exact_session: Session) -> None:
    seen: list[tuple[int, int]] = []
    exact_session.generate(random_ids(70, seed=70), 1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 70), (64, 70), (70, 70)]
    seen.clear()
    exact_session.score([random_ids(40), random_ids(10)], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 50), (40, 50), (50, 50)]


def test_a_stream_gives_what_generate_gives(exact_session: Session) -> None:
    whole = exact_session.generate(TEXT[:50], 20)
    stream = exact_session.generate(TEXT[:50], 20, stream=True)
    assert stream.generation is None
    pieces = list(stream)
    assert [piece.id for piece in pieces] == whole.ids.tolist()
    assert "".join(piece.text or "" for piece in pieces) == whole.text
    assert stream.generation is not None
    assert stream.generation.finish_reason == whole.finish_reason
    assert list(stream) == []


def test_streams_at_once_and_calls_between_their_tokens(two_stage_session: Session) -> None:
    """Two streams and a score in an artifact of two slots, turn by turn."""
    prompts = [random_ids(length, seed=length) for length in (90, 20)]
    expected = [two_stage_session.generate(ids, 8).ids.tolist() for ids in prompts]
    score = two_stage_session.score(prompts[0])
    streams = [two_stage_session.generate(ids, 8, stream=True) for ids in prompts]
    found: list[list[int]] = [[], []]
    for _ in range(8):
        for ids, stream in zip(found, streams, strict=True):
            ids.append(next(stream).id)
        np.testing.assert_array_equal(two_stage_session.score(prompts[0]).logprobs, score.logprobs)
    assert found == expected


@pytest.mark.parametrize("way", ["close", "with", "del", "never begun"])
def test_a_stream_that_is_let_go_gives_its_slot_back(exact_session: Session, way: str) -> None:
    ids = random_ids(40)
    expected = exact_session.generate(ids, 6).ids.tolist()
    for _ in range(3):
        stream = exact_session.generate(ids, 60, stream=True)
        if way == "with":
            with stream:
                next(stream)
        elif way != "never begun":
            next(stream)
        if way == "close":
            stream.close()
            assert list(stream) == []
        del stream
    assert exact_session.generate(ids, 6).ids.tolist() == expected
    assert not exact_session._engine.busy
    assert not exact_session._events


def test_an_interrupted_call_is_told_to_the_others(exact_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose cache a failed call took away says so; the next request goes on as ever."""
    ids = random_ids(40)
    expected = exact_session.generate(ids, 6).ids.tolist()
    stream = exact_session.generate(ids, 6, stream=True)
    next(stream)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(exact_session._runner, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exact_session.score(random_ids(10))
    monkeypatch.undo()
    # What was written before is there.
    assert next(stream).id == expected[1]
    with pytest.raises(RuntimeError, match="cannot be continued, because a call on the same cache failed"):
        next(stream)
    assert list(stream) == []
    assert exact_session.generate(ids, 6).ids.tolist() == expected


def test_a_failed_callback_leaves_the_session_usable(exact_session: Session) -> None:
    ids = random_ids(50)
    before = exact_session.score(ids).logprobs

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact_session.score(ids, progress=fail)
    np.testing.assert_array_equal(exact_session.score(ids).logprobs, before)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the sequence is empty, expected at least one token"),
        ([[1, 2], []], "sequence 1 is empty"),
        ([1, VOCABULARY], f"token id {VOCABULARY} at position 1, expected ids from 0 to {VOCABULARY - 1}"),
        ([5, -1], "token id -1 at position 1"),
        (np.ones(129, np.int64), "129 tokens and the largest bucket takes 128"),
        (np.ones(3), "dtype float64, expected 1-D integers"),
        (np.ones((2, 3), np.int32), r"shape \(2, 3\)"),
    ],
)
def test_score_refuses(exact_session: Session, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_session.score(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [4, 5000]}, "the prompt has token id 5000 at position 1"),
        ({"prompt": np.ones(129, np.int64)}, "compile the checkpoint with a larger bucket"),
        ({"prompt": [4], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": [4], "temperature": -1.0}, "temperature is -1.0"),
        ({"prompt": [4], "temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_generate_refuses(exact_session: Session, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_session.generate(**options)
