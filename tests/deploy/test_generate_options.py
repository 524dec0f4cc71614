"""Options of generating: stop strings, log-probabilities, defaults of the checkpoint, chats, async."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iceformer
from iceformer.deploy.generation_defaults import GenerationDefaults
from iceformer.deploy.generation_options import Choices, choices
from iceformer.deploy.sampling import Sampling
from iceformer.deploy.session import Session
from iceformer.deploy.stream import Piece

PROMPT = "Once upon a time"


def test_a_stop_string_ends_the_text_and_never_leaks(exact_session: Session) -> None:
    whole = exact_session.generate(PROMPT, 30)
    assert whole.text
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    stream = exact_session.generate(PROMPT, 30, stream=True, stop=[stop])
    pieces = list(stream)
    assert stream.generation is not None
    expected = whole.text[: whole.text.index(stop)]
    assert "".join(piece.text or "" for piece in pieces) == stream.generation.text == expected
    assert stream.generation.finish_reason == "stop"
    assert stream.generation.ids.tolist() == whole.ids.tolist()[: len(pieces)]
    assert exact_session.generate(PROMPT, 30).text == whole.text


def test_logprobs_are_those_of_score(exact_session: Session) -> None:
    prompt = exact_session.tokenize(PROMPT)
    generation = exact_session.generate(prompt, 8, logprobs=3)
    score = exact_session.score(np.concatenate([prompt, generation.ids]))
    assert generation.logprobs is not None
    assert len(generation.logprobs) == len(generation.ids)
    np.testing.assert_allclose([each.logprob for each in generation.logprobs], score.logprobs[-8:], atol=2e-4)
    assert [each.top[0][0] for each in generation.logprobs] == generation.ids.tolist()
    assert all(len(each.top) == 3 for each in generation.logprobs)
    assert exact_session.generate(prompt, 2).logprobs is None


def test_bias_and_penalties_change_the_text(exact_session: Session) -> None:
    plain = exact_session.generate(PROMPT, 12).ids.tolist()
    banned = exact_session.generate(PROMPT, 12, logit_bias={plain[0]: -1e4}).ids.tolist()
    assert plain[0] not in banned
    wanted = exact_session.generate(PROMPT, 3, logit_bias={7: 1e4}).ids.tolist()
    assert wanted == [7, 7, 7]
    unlike = exact_session.generate(PROMPT, 12, logit_bias={7: 30.0, 8: 29.0}, frequency_penalty=2.0).ids.tolist()
    assert {7, 8} <= set(unlike)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": "x"}, "expected a list"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"top_k": -1}, "top_k is -1"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token id 1000000"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_refusals_leave_the_session_usable(exact_session: Session, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_session.generate(PROMPT, **options)
    assert exact_session.generate(PROMPT, 1).ids.size == 1


def test_an_unknown_option_is_named(exact_session: Session) -> None:
    with pytest.raises(TypeError, match="no option topk"):
        exact_session.generate(PROMPT, topk=3)  # type: ignore[call-overload]


def test_async_for(exact_session: Session) -> None:
    async def both() -> list[list[Piece]]:
        async def one(prompt: str) -> list[Piece]:
            return [piece async for piece in exact_session.generate(prompt, 6, stream=True)]

        return list(await asyncio.gather(one(PROMPT), one("The fox")))

    for pieces, prompt in zip(asyncio.run(both()), (PROMPT, "The fox"), strict=True):
        assert [piece.id for piece in pieces] == exact_session.generate(prompt, 6).ids.tolist()


def test_the_second_question_starts_behind_the_document(exact_artifact: Path) -> None:
    document = list(range(4, 104))
    with iceformer.load(exact_artifact) as session:
        first = session.generate([*document, 5, 6], 4)
        second = session.generate([*document, 7, 8, 9], 4)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= 64


def test_memory_of_prefixes_stays_within_the_limit(exact_artifact: Path) -> None:
    limit = 300_000
    with iceformer.load(exact_artifact, cache_ram=limit) as session:
        for seed in range(12):
            session.generate(np.random.default_rng(seed).integers(4, 90, 120), 1)
        assert 0 < session._prefixes.size_in_bytes <= limit
    with pytest.raises(ValueError, match="cache_ram is -1"):
        iceformer.load(exact_artifact, cache_ram=-1)


def test_no_chat_template(exact_session: Session) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        exact_session.chat([{"role": "user", "content": "Hello"}])


SAMPLES = GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.1)


def test_the_checkpoints_defaults() -> None:
    def chosen(defaults: GenerationDefaults | None, temperature: float | None = None, **options: Any) -> Choices:
        return choices(defaults, None, temperature, 3, options)  # type: ignore[arg-type]

    asked = chosen(SAMPLES).sampling
    assert asked == Sampling(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=3)
    assert chosen(SAMPLES, 0.0, top_k=0).sampling == replace(asked, temperature=0.0, top_k=0)
    greedy = replace(SAMPLES, do_sample=False, stop_strings=("END",), max_new_tokens=7)
    assert chosen(greedy).sampling == Sampling(repetition_penalty=1.1, seed=3)
    assert chosen(greedy, 1.0).sampling == Sampling(temperature=1.0, repetition_penalty=1.1, seed=3)
    assert chosen(greedy).stop == ("END",)
    assert chosen(greedy, stop=[]).stop == ()
    assert chosen(greedy).max_new_tokens == 7
    assert chosen(None).max_new_tokens == 64
