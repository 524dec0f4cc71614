"""Questions over long contexts with their answers, as kvpress writes them down, and as token ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from ..host.text import lines_of, read_text
from .tokenization import TextTokenizer

ROOM = 256
"""Tokens that question and answer may take."""
SUFFIX = ".jsonl"
"""Of a file of examples."""
_FIELDS = ("context", "question", "answer_prefix", "answer")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        context: the long text.
        question: what stands behind it.
        answer_prefix: the beginning of the answer, which is given.
        answer: what is to follow.
        max_new_tokens: that the answer may take.
    """

    context: str
    question: str
    answer_prefix: str
    answer: str
    max_new_tokens: int


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


def read_examples(file: Path) -> list[Example]:
    """The examples of a file, one JSON object a line with `context`, `question`, `answer_prefix` and `answer`, as
    kvpress has them: the last is a text, or a list of texts that all belong to it. `answer_prefix` may be left out, and
    so may `max_new_tokens`, which then is the room for an answer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such example, or no line at all.
    """
    lines = [(number, line) for number, line in enumerate(lines_of(read_text(file)), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} has no lines, expected an example a line")
    return [_example(line, f"{file}, line {number}") for number, line in lines]


def _example(line: str, where: str) -> Example:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{where} is not an object, expected one with {', '.join(_FIELDS)}")
    answer = given.get("answer")
    if isinstance(answer, list) and all(isinstance(part, str) for part in answer):
        answer = ", ".join(answer)
    texts: dict[str, Any] = {"answer_prefix": "", **given, "answer": answer}
    for name in _FIELDS:
        if not isinstance(texts.get(name), str) or not (texts[name].strip() or name == "answer_prefix"):
            raise ValueError(f"{where} has no text for {name}, expected {', '.join(_FIELDS)}")
    limit = given.get("max_new_tokens", ROOM)
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"{where}: max_new_tokens is {limit!r}, expected a number of at least 1")
    prefix, answer = texts["answer_prefix"], texts["answer"]
    # A model writes the blank that separates words; what is in brackets or quotes has none.
    blank = " " if prefix[-1:].isalnum() or prefix[-1:] == ":" else ""
    return Example(texts["context"], texts["question"], prefix, blank + answer.lstrip(), limit)
