"""What a configuration keeps of the answers to questions over long contexts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .answers import Answer
from .configuration import REFERENCE
from .retention import retention


@dataclass(frozen=True)
class TaskFigures:
    """Over some questions.

    Attributes:
        questions: how many.
        exact_right: answers that are right with exact attention.
        right: answers that are right with the configuration.
        logprob_loss: by how much the mean log-probability of the right answer falls.
        retention: right answers over those with exact attention, NaN if the latter has none.
    """

    questions: int
    exact_right: int
    right: int
    logprob_loss: float
    retention: float


def task_figures(answers: Iterable[Answer], configuration: str) -> TaskFigures | None:
    """The figures of a configuration over the answers to some questions, of all configurations; None if it has none."""
    asked = {REFERENCE: {}, configuration: {}}
    for answer in answers:
        if answer.configuration in asked:
            key = (answer.task, answer.tokens, answer.sample, answer.depth, answer.known)
            asked[answer.configuration][key] = answer
    exact, own = asked[REFERENCE], asked[configuration]
    both = sorted(exact.keys() & own.keys())
    if not both:
        return None
    right, exact_right = [own[key].right for key in both], [exact[key].right for key in both]
    return TaskFigures(
        len(both),
        sum(exact_right),
        sum(right),
        math.fsum(exact[key].logprob - own[key].logprob for key in both) / len(both),
        retention(exact_right, right),
    )
