"""Examples as token ids, and what a model makes of them: the answer token by token, given the right ones before."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from ..deploy.tokenization import TextTokenizer
from .examples import Example

ROOM = 256
"""Tokens that question and answer may take."""


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


@dataclass(frozen=True, eq=False)
class Question:
    """What stands behind a context, as token ids; the last `answer` of them are the answer's."""

    ids: Int32[np.ndarray, " tokens"]
    answer: int

    @classmethod
    def of(cls, example: Example, tokenizer: TextTokenizer) -> "Question":
        """Tokenises question and answer.

        Raises:
            ValueError: they are longer than `ROOM`.
        """
        before = f"\n\n{example.question}\n{example.answer_prefix}"
        tokens = tokenizer.encode(before + example.answer, add_special_tokens=False)
        if tokens.ids.size > ROOM:
            raise ValueError(f"question and answer have {tokens.ids.size} tokens, expected at most {ROOM}")
        blank = len(example.answer) - len(example.answer.lstrip())
        # A blank may be a token of its own, and need not be guessed.
        first = int(np.searchsorted(tokens.offsets[:, 1], len(before) + blank, "right"))
        return cls(tokens.ids, tokens.ids.size - first)
