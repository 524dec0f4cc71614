"""Windows of a text, and what questions about it come to."""

import math
from pathlib import Path

import numpy as np
import pytest

from iceformer.deploy.calibration import read_tokenizer
from iceformer.deploy.text_windows import Text, leading_tokens, windows_of
from iceformer.evaluate.answers import Answer
from iceformer.evaluate.task_figures import task_figures
from iceformer.evaluate.texts import read_ids


def text(name: str, tokens: int) -> Text:
    return Text(name, "", np.arange(tokens, dtype=np.int32))


def test_windows_are_the_middles_of_equal_parts() -> None:
    found = windows_of([text("a", 100), text("b", 64)], 20, 3, np.array([7, 8], np.int32))
    assert [(each.text, each.start) for each in found] == [("a", 16), ("a", 66), ("b", 23)]
    for each in found:
        assert each.ids.tolist() == [7, 8, *range(each.start, each.start + 18)]


def test_texts_that_are_too_short_or_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 39 tokens, expected at least 40 for its share of windows, 2 of 20"):
        windows_of([text("a", 39)], 20, 2, np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="windows is 1, expected at least one for each of the 2 texts"):
        windows_of([text("a", 99), text("b", 99)], 20, 1, np.zeros(0, np.int32))


def test_ids_of_files(long_llama: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(long_llama / "tokenizer.json", 512)
    assert leading_tokens(tokenizer).tolist() == [0]
    assert leading_tokens(None).tolist() == []
    (tmp_path / "ids.json").write_text("[3, 1, 2]")
    np.save(tmp_path / "ids.npy", np.array([3, 1, 2], np.int64))
    (tmp_path / "story.txt").write_text("The end.")
    for name in ("ids.json", "ids.npy"):
        found = read_ids(tmp_path / name, None, 512)
        assert (found.name, found.ids.tolist(), found.ids.dtype) == (name, [3, 1, 2], np.int32)
    story = read_ids(tmp_path / "story.txt", tokenizer, 512)
    assert tokenizer.decode(story.ids.tolist()) == "The end."
    with pytest.raises(ValueError, match="expected ids from 0 to 2"):
        read_ids(tmp_path / "ids.npy", None, 3)
    (tmp_path / "ids.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a 1-D array of token ids"):
        read_ids(tmp_path / "ids.json", None, 512)


def answer(configuration: str, sample: int, right: bool, logprob: float) -> Answer:
    return Answer(configuration, "passkey", 1024, sample, 0, 0.5, True, right, logprob)


def test_answers_are_compared_question_by_question() -> None:
    exact = [answer("exact", 0, True, -1.0), answer("exact", 1, True, -2.0), answer("exact", 2, False, -3.0)]
    own = [answer("a", 1, False, -4.0), answer("a", 0, True, -0.5)]
    found = task_figures([*exact, *own], "a")
    assert found is not None
    assert (found.questions, found.exact_right, found.right, found.retention) == (2, 2, 1, 0.5)
    assert found.logprob_loss == pytest.approx((-3.0 + 4.5) / 2)
    assert task_figures(exact, "a") is None
    none_right = task_figures([exact[2], answer("a", 2, True, -1.0)], "a")
    assert none_right is not None
    assert math.isnan(none_right.retention)
