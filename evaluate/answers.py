"""What a configuration makes of questions: the answer token by token, given the right ones before."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a configuration makes of one question.

    Attributes:
        configuration: its name.
        task: key of `TASKS`.
        tokens: of the longest prompt of the task at this length.
        sample: number of the context, from 0.
        depth: index of the depth.
        place: share of the context that stands before what the question asks for.
        known: whether the question stood in the exact last block of the prompt, where the attention has one; else it
            came after the prefilled context, and attended to a selection like every other query.
        right: whether every token of the answer is the most likely one.
        logprob: log-probability of the whole answer, natural logarithm.
    """

    configuration: str
    task: str
    tokens: int
    sample: int
    depth: int
    place: float
    known: bool
    right: bool
    logprob: float
