"""Records in LongEval's format, and where their answers stand once they are tokens."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from iceformer.evaluate.line_retrieval import make_record, pseudo_words, read_longeval
from iceformer.evaluate.retention import Task, retention

TOKENIZER = Path(__file__).parents[2] / "demo" / "model" / "tokenizer.json"
WORDS = pseudo_words(np.random.default_rng(0), 400)


@pytest.mark.parametrize(("asked", "closing"), [(0.0, 1), (0.0, 5), (1.0, 2)])
def test_every_answer_is_the_value_of_the_line_asked_for(asked, closing) -> None:
    record = make_record(np.random.default_rng(1), 50, WORDS, asked=asked, closing=closing)
    lines = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", record.text, re.MULTILINE)
    first_value: dict[str, str] = {}
    for key, value in lines:
        assert first_value.setdefault(key, value) == value
    assert len(first_value) == 50
    assert len(record.questions) >= closing
    for question in record.questions:
        assert record.text[question.start : question.end] == str(question.value) == first_value[question.key]
        assert record.text[question.end] == ">"
        assert record.text[: question.start].endswith(f"line {question.key}: REGISTER_CONTENT is <")


def test_records_follow_from_the_seed() -> None:
    texts = [make_record(np.random.default_rng(seed), 20, WORDS).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_answers_are_found_among_the_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    record = make_record(np.random.default_rng(2), 30, WORDS, asked=1.0, closing=2)
    task = Task.of(record, tokenizer)
    assert len(task.answers) == len(record.questions)
    for answer, question in zip(task.answers, record.questions, strict=True):
        assert tokenizer.decode(task.ids[answer.start : answer.stop].tolist()) == f"{question.value}>"


def test_retention_divides_right_answers() -> None:
    assert retention([True, True, True, False], [True, True, False, False]) == pytest.approx(2 / 3)
    assert np.isnan(retention([False], [False]))
    with pytest.raises(ValueError, match="expected as many"):
        retention([True], [True, False])


def test_reads_the_published_cases(shared_data: Path) -> None:
    cases = read_longeval(shared_data / "longeval" / "200_lines.jsonl")
    assert len(cases) == 50
    for case in cases:
        (question,) = case.questions
        lines = dict(re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", case.text, re.MULTILINE))
        assert lines[question.key] == str(question.value) == case.text[question.start : question.end]


def test_says_which_line_is_not_a_case(tmp_path: Path) -> None:
    good = {"random_idx": ["a-b", 0], "expected_number": 7, "num_lines": 1, "prompt": "line a-b: ... "}
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "expected_number": "seven"}) + "\n")
    with pytest.raises(ValueError, match="line 2 is not a case"):
        read_longeval(file)
