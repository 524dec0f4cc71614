"""The official `openai` client, unchanged: what it gets is what the session writes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

import iceformer
from iceformer.deploy.session import Generation, Session

from .conftest import CONTEXT, MESSAGES, NO_END, PROMPT, Served

BIAS = {int(token): float(value) for token, value in NO_END.items()}


def alone(session: Session, prompt: str, tokens: int, **options: Any) -> Generation:
    return session.generate(prompt, tokens, logit_bias=BIAS, **options)


def complete(client: OpenAI, prompt: Any, tokens: int, **options: Any) -> Any:
    return client.completions.create(model="fox", prompt=prompt, max_tokens=tokens, logit_bias=NO_END, **options)


def chat(client: OpenAI, **options: Any) -> Any:
    options = {"model": "fox", "messages": MESSAGES, "logit_bias": NO_END, **options}
    return client.chat.completions.create(**options)


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("fox", "iceformer")
    assert client.models.retrieve("fox") == model


def test_chat_is_what_the_session_answers(client: OpenAI, session: Session) -> None:
    expected = session.chat(MESSAGES, 12, logit_bias=BIAS)
    answer = chat(client, max_completion_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 12)
    assert answer.usage.total_tokens == expected.prompt_tokens + 12
    timings = answer.timings
    assert timings["prompt_n"] + timings["cache_n"] == expected.prompt_tokens
    assert timings["predicted_n"] == 12
    assert timings["predicted_per_second"] == pytest.approx(11e3 / timings["predicted_ms"], rel=1e-3)


def test_a_chat_may_fill_the_context(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT


def test_the_model_ends_its_text_itself(client: OpenAI, session: Session) -> None:
    """The bias makes the end the likeliest token."""
    answer = client.completions.create(model="fox", prompt=PROMPT, logit_bias={"2": 10_000})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_parts_of_a_message_are_one_text(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "count "}, {"type": "text", "text": "the stars"}]
    whole = chat(client, max_tokens=8).choices[0].message.content
    assert chat(client, max_tokens=8, messages=[{"role": "user", "content": parts}]).choices[0].message.content == whole


def test_variables_of_the_template(client: OpenAI, session: Session) -> None:
    with_name = session.chat_prompt(MESSAGES, name="fox")
    assert "<s>fox: " in with_name
    expected = session.generate(with_name, 8, logit_bias=BIAS, add_special_tokens=False).text
    answer = chat(client, max_tokens=8, extra_body={"chat_template_kwargs": {"name": "fox"}})
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("options", [{}, {"stop": ["\n", "o"]}, {"logprobs": True, "top_logprobs": 2}])
def test_a_streamed_chat_joins_to_the_whole_one(client: OpenAI, options: dict[str, Any]) -> None:
    whole = chat(client, max_tokens=40, **options)
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}, **options))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole.choices[0].finish_reason]
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert all(part.usage is None for part in parts)
    assert parts[-1].timings["predicted_n"] == whole.usage.completion_tokens
    if options.get("logprobs"):
        streamed = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
        assert streamed == whole.choices[0].logprobs.content


def test_a_stream_without_usage_has_none(client: OpenAI) -> None:
    chunks = list(chat(client, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_completions(client: OpenAI, session: Session) -> None:
    expected = alone(session, PROMPT, 16)
    answer = client.completions.create(model="fox", prompt=PROMPT, logit_bias=NO_END)
    assert answer.choices[0].text == expected.text
    ids = session.tokenize(PROMPT).tolist()
    assert complete(client, ids, 16).choices[0].text == expected.text
    streamed = complete(client, PROMPT, 16, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected.text


def test_several_prompts_each_n_times(client: OpenAI, session: Session) -> None:
    prompts = [PROMPT, "the stars at night"]
    answer = complete(client, prompts, 6, n=2)
    expected = [alone(session, prompt, 6).text for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == sum(len(session.tokenize(prompt)) for prompt in prompts)
    texts = ["", "", "", ""]
    for chunk in complete(client, prompts, 6, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_seeds(client: OpenAI, session: Session) -> None:
    """Text i of n is drawn with the seed plus i."""
    answer = complete(client, PROMPT, 12, n=3, seed=7, temperature=1.5, top_p=0.9, extra_body={"top_k": 50})
    expected = [alone(session, PROMPT, 12, temperature=1.5, seed=7 + i, top_p=0.9, top_k=50).text for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 3
    drawn = {complete(client, PROMPT, 12, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(drawn) == 3


def test_penalties(client: OpenAI, session: Session) -> None:
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    assert complete(client, PROMPT, 20, **options).choices[0].text == alone(session, PROMPT, 20, **options).text
    more = complete(client, PROMPT, 20, extra_body={"repetition_penalty": 1.3}).choices[0].text
    assert more == alone(session, PROMPT, 20, repetition_penalty=1.3).text


def test_stop(client: OpenAI, session: Session) -> None:
    whole = alone(session, PROMPT, 30).text or ""
    stop = whole[10:12]
    answer = complete(client, PROMPT, 30, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    assert answer.usage.completion_tokens < 30


def test_logprobs_of_a_chat(client: OpenAI, session: Session) -> None:
    expected = session.chat(MESSAGES, 5, logit_bias=BIAS, logprobs=3)
    answer = chat(client, max_tokens=5, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert expected.logprobs is not None
    assert [token.logprob for token in tokens] == [each.logprob for each in expected.logprobs]
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == expected.text
    for token, each in zip(tokens, expected.logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == [logprob for _, logprob in each.top]


def test_logprobs_of_a_completion(client: OpenAI, session: Session) -> None:
    expected = alone(session, PROMPT, 5, logprobs=2)
    logprobs = complete(client, PROMPT, 5, logprobs=2).choices[0].logprobs
    assert expected.logprobs is not None
    assert logprobs.token_logprobs == [each.logprob for each in expected.logprobs]
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5
    lengths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(lengths[:place]) for place in range(5)]


def test_a_request_writes_the_same_alone_among_others_and_after_a_cache_hit(served: Served, artifact: Path) -> None:
    """Two hundred mixed requests, sixteen at a time in two slots: short and long prompts that share beginnings, each of
    them ten times, streamed and whole. Alone, they run without a prefix cache.
    """
    client = served.client()
    prompts = [PROMPT[: 10 + 3 * (index % 7)] * (2 + 2 * (index % 6)) + str(index % 4) for index in range(20)]
    with iceformer.load(artifact, cache_ram=0) as session:
        expected = [alone(session, prompt, 4 + index).text for index, prompt in enumerate(prompts)]

    def ask(number: int) -> tuple[str, int]:
        index, stream = number % 20, number % 3 == 1
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = complete(client, prompts[index], 4 + index, **options)
        if not stream:
            return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens
        *chunks, last = answer
        return "".join(chunk.choices[0].text for chunk in chunks), last.usage.prompt_tokens_details.cached_tokens

    order = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, order))
    assert [text for text, _ in answers] == [expected[number % 20] for number in order]
    assert sum(cached > 0 for _, cached in answers) > 50


def test_a_prompt_that_was_read_is_not_read_again(client: OpenAI) -> None:
    prompt = "the wood and the stars " * 16
    first = complete(client, prompt, 2)
    again = complete(client, prompt + "at night", 2)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 64
    assert again.timings["cache_n"] == again.usage.prompt_tokens_details.cached_tokens
