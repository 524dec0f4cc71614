"""Retention: accuracy with two-stage attention divided by accuracy with exact attention, on the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..deploy.session import Progress, Score, Session
from .line_retrieval import Record


@dataclass(frozen=True)
class Task:
    """A text as token ids, and where in it the answers stand.

    Attributes:
        ids: token ids, int32 [n].
        answers: the token positions of each answer, its closing `>` included.
    """

    ids: NDArray[np.int32]
    answers: tuple[range, ...]

    @classmethod
    def of(cls, record: Record, tokenizer: Tokenizer) -> "Task":
        """Tokenises a record with its questions and answers."""
        encoding = tokenizer.encode(record.text)
        ends = np.array([end for _, end in encoding.offsets])
        answers = tuple(
            range(
                int(np.searchsorted(ends, question.start, "right")),
                int(np.searchsorted(ends, question.end, "right")) + 1,
            )
            for question in record.questions
        )
        return cls(np.asarray(encoding.ids, np.int32), answers)


def answers_right(session: Session, task: Task, progress: Progress | None = None) -> NDArray[np.bool_]:
    """Whether the model gives each answer token by token, greedily. bool [answers]

    The given text goes on with the right answer, which changes nothing: an answer that is right up to a token saw only
    right tokens before it.
    """
    score = session.score(task.ids, progress=progress)
    assert isinstance(score, Score)
    return np.array([all(score.argmax[i - 1] == task.ids[i] for i in answer) for answer in task.answers], bool)


def retention(exact: Sequence[bool] | NDArray[np.bool_], two_stage: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Right answers of the second over right answers of the first; NaN where exact attention has none right.

    Raises:
        ValueError: the two were not asked the same number of questions.
    """
    if len(exact) != len(two_stage):
        raise ValueError(f"{len(exact)} exact answers and {len(two_stage)} two-stage answers, expected as many")
    right = int(np.sum(exact))
    return int(np.sum(two_stage)) / right if right else float("nan")
