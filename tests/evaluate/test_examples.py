"""Generated questions: what they hide, where, and that a seed gives the same ones."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from iceformer.deploy.calibration import read_tokenizer
from iceformer.deploy.examples import ROOM, Example, Question
from iceformer.deploy.tokenization import TextTokenizer
from iceformer.evaluate.examples import HiddenAnswer, Setting
from iceformer.evaluate.line_retrieval import INTRODUCTION
from iceformer.evaluate.tasks import TASKS

DEPTHS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def tokenizer(long_llama: Path) -> TextTokenizer:
    return read_tokenizer(long_llama / "tokenizer.json", 512)


def make(task: str, tokenizer: TextTokenizer, text: Path, seed: int = 0, tokens: int = 2000) -> list[HiddenAnswer]:
    return TASKS[task](Setting(np.random.default_rng(seed), tokenizer, tokens, DEPTHS, text.read_text()))


@pytest.mark.parametrize("task", ["passkey", "needle", "lines", "key_value", "repetition", "multi_key"])
def test_answers_stand_in_the_context_at_their_depths(task: str, tokenizer: TextTokenizer, text: Path) -> None:
    examples = make(task, tokenizer, text)
    assert len(examples) == len(DEPTHS)
    context = examples[0].context
    assert 1800 < tokenizer.encode(context, add_special_tokens=False).ids.size <= 2000
    for example, depth in zip(examples, DEPTHS, strict=True):
        assert example.context == context
        assert example.depth == pytest.approx(depth, abs=0.05)
        given = context.find(example.answer_prefix + example.answer)
        place = given if given >= 0 else context.index(example.answer.strip())
        before = len(INTRODUCTION) if task == "lines" else 0
        assert (place - before) / (len(context) - before) == pytest.approx(depth, abs=0.08)
    assert examples == make(task, tokenizer, text)
    assert examples != make(task, tokenizer, text, seed=1)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_contexts_are_full_and_a_seed_gives_the_same(task: str, tokenizer: TextTokenizer, text: Path) -> None:
    examples = make(task, tokenizer, text)
    assert len({example.context for example in examples}) == 1
    assert 1700 < tokenizer.encode(examples[0].context, add_special_tokens=False).ids.size <= 2000
    assert all(Question.of(example, tokenizer).answer > 0 for example in examples)
    assert examples == make(task, tokenizer, text)
    assert examples != make(task, tokenizer, text, seed=1)


def numbers_of(example: HiddenAnswer) -> list[str]:
    return re.findall(r"\d+", example.answer)


def test_several_values_stand_behind_each_other(tokenizer: TextTokenizer, text: Path) -> None:
    for example, depth in zip(make("multi_value", tokenizer, text), DEPTHS, strict=True):
        name = re.findall(r"numbers for (\w+) mentioned", example.question)[0]
        assert re.findall(rf"numbers for {name} is: (\d+)", example.context) == numbers_of(example)
        assert len(numbers_of(example)) == 4
        assert example.depth == pytest.approx(depth, abs=0.08)


def test_several_names_are_asked_for_at_once(tokenizer: TextTokenizer, text: Path) -> None:
    for example in make("multi_query", tokenizer, text):
        names = re.findall(r"[A-Z]\w+", example.question.split("numbers for ")[1])
        found = [re.findall(rf"numbers for {name} is: (\d+)", example.context) for name in names]
        assert [number for (number,) in found] == numbers_of(example)


def test_a_chain_of_variables_has_one_value(tokenizer: TextTokenizer, text: Path) -> None:
    for example in make("variable_tracking", tokenizer, text):
        known: dict[str, str] = {}
        pairs: list[tuple[str, str]] = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.context)
        for name, value in pairs:
            known[name] = known.get(value, value)
        asked = re.findall(r"\d+", example.question)[0]
        chain = example.answer.strip().split(", ")
        assert len(chain) == 5
        assert chain == [name for name, value in known.items() if value == asked]


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_the_most_frequent_words_come_first(task: str, tokenizer: TextTokenizer, text: Path) -> None:
    (example,) = make(task, tokenizer, text)
    listed = example.context.split("\n", 1)[1]
    counts = Counter(word for word in listed.split() if word.isalpha())
    assert example.answer.strip().split(", ") == [word for word, _ in counts.most_common(3)]
    assert len({count for _, count in counts.most_common(4)}) == 4


def test_a_filler_that_is_too_short_is_refused(tokenizer: TextTokenizer, text: Path) -> None:
    with pytest.raises(ValueError, match="tokens of filler"):
        make("needle", tokenizer, text, tokens=100_000)


def test_the_answer_is_the_end_of_a_question(tokenizer: TextTokenizer) -> None:
    example = Example("context", "What is the key?", "The key is", " 4711", 8)
    question = Question.of(example, tokenizer)
    assert tokenizer.decode(question.ids.tolist()) == "\n\nWhat is the key?\nThe key is 4711"
    answer = tokenizer.decode(question.ids[-question.answer :].tolist())
    assert answer.strip() == "4711"
    with pytest.raises(ValueError, match=f"expected at most {ROOM}"):
        Question.of(Example("context", "What? " * 200, "", "1", 8), tokenizer)
