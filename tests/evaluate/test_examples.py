"""Generated questions: what they hide, where, and that a seed gives the same ones."""

from pathlib import Path

import numpy as np
import pytest

from iceformer.deploy.calibration import read_tokenizer
from iceformer.deploy.examples import ROOM, Example, Question
from iceformer.deploy.tokenization import TextTokenizer
from iceformer.evaluate.examples import TASKS, HiddenAnswer, Setting
from iceformer.evaluate.line_retrieval import INTRODUCTION

DEPTHS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def tokenizer(long_llama: Path) -> TextTokenizer:
    return read_tokenizer(long_llama / "tokenizer.json", 512)


def make(task: str, tokenizer: TextTokenizer, text: Path, seed: int = 0, tokens: int = 2000) -> list[HiddenAnswer]:
    return TASKS[task](Setting(np.random.default_rng(seed), tokenizer, tokens, DEPTHS, text.read_text()))


@pytest.mark.parametrize("task", sorted(TASKS))
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
