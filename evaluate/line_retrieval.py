"""Records in the format of LongEval's line retrieval, with as many questions as wanted.

A record is a list of lines `line KEY: REGISTER_CONTENT is <VALUE>`; a question repeats the start of a line seen
before, and its answer is that line's value. LongEval asks one question, after the record; here questions may also
stand anywhere between the lines, which gives many answers for one pass over a long text.

Source of the format: LongEval (Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?", 2023).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..host.text import lines_of, read_text

Made = TypeVar("Made")

INTRODUCTION = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
CLOSING = "\nNow the record is over. "
QUESTION = "Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. "
ANSWER_PREFIX = "line {key}: REGISTER_CONTENT is <"

_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sp st str t th tr v w wh y z"
_NUCLEI = "a e i o u ai ea ee ia ie io oa oo ou y"
_CODAS = " b ck d ft g l ll lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk ss st t th ve x"
_ENDINGS = " able al ed en er est ful ic ing ion ish ism ist ity ive le less ly ment ness or ous s ship tion ty y"


@dataclass(frozen=True)
class Question:
    """A question of a record: `text[start:end]` is its answer (the digits)."""

    key: str
    value: int
    start: int
    end: int
    distance: int  # lines between the line asked for and the question


@dataclass(frozen=True)
class Record:
    text: str
    questions: tuple[Question, ...]


def pseudo_words(rng: np.random.Generator, count: int) -> list[str]:
    """Pronounceable made-up words of one to three syllables, some with an English ending."""
    onsets, nuclei = _ONSETS.split(" "), _NUCLEI.split(" ")
    codas, endings = _CODAS.split(" "), _ENDINGS.split(" ")
    words = []
    for _ in range(count):
        syllables = (
            str(rng.choice(onsets)) + str(rng.choice(nuclei)) + str(rng.choice(codas))
            for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.5, 0.1]))
        )
        words.append("".join(syllables) + (str(rng.choice(endings)) if rng.random() < 0.4 else ""))
    return sorted(set(words))


def words_of_text(text: str, least: int = 2) -> list[str]:
    """The lower-case words of three letters or more that occur at least `least` times."""
    counts = Counter(re.findall(r"[a-z]{3,}", text.lower()))
    return sorted(word for word, count in counts.items() if count >= least)


def _value(rng: np.random.Generator) -> int:
    """LongEval's values are uniform in 1..50000; every other value is spread over the number of digits instead."""
    if rng.random() < 0.5:
        return int(rng.integers(1, 50001))
    return int(rng.integers(1, 10 ** int(rng.integers(1, 7))))


def longest_fit(make: Callable[[int], Made], count: Callable[[Made], int], tokens: int) -> tuple[Made, int]:
    """What is made of as many lines as give nearly so many tokens and never more, and the number of lines.

    Args:
        make: of a number of lines.
        count: the tokens of what was made.
        tokens: at most.
    """
    lines = tokens // 12
    while True:
        made = make(lines)
        excess = count(made) / tokens
        if excess <= 1:
            return made, lines
        # How long a line is and how many questions follow it is drawn anew: the last steps must be small.
        lines = int(lines * min(0.99, 1.05 / excess))


def make_record(
    rng: np.random.Generator,
    lines: int,
    words: Sequence[str],
    *,
    asked: float = 0.0,
    closing: int = 1,
    sentences: float = 0.0,
    introduction: bool = True,
) -> Record:
    """A record of `lines` different lines.

    `asked` is the number of questions per line put between the lines, `closing` the number put after the record;
    a question is a repeated line, and with probability `sentences` LongEval's question stands before it (always
    before the first one after the record, as LongEval has it).  With `asked=0, closing=1` this is LongEval's task.
    Keys share words, as LongEval's do, so that one word is not enough to find a line.
    """
    least = int(np.ceil(np.sqrt(lines))) + 4
    pool = int(np.clip(lines * np.exp(rng.uniform(np.log(0.3), np.log(4.0))), least, len(words)))
    firsts = rng.integers(len(words), size=pool)
    seconds = rng.integers(len(words), size=pool)

    keys: list[str] = []
    values: list[int] = []
    known: set[str] = set()
    questions: list[Question] = []
    parts: list[str] = []
    length = 0

    def write(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(text)

    def ask(sentence: bool) -> None:
        which = int(rng.integers(len(keys)))
        key, value = keys[which], values[which]
        if sentence:
            write(QUESTION.format(key=key))
        write(ANSWER_PREFIX.format(key=key))
        answer = str(value)
        questions.append(Question(key, value, length, length + len(answer), len(keys) - which))
        write(answer + ">\n")

    if introduction:
        write(INTRODUCTION)
    while len(keys) < lines:
        key = f"{words[firsts[rng.integers(pool)]]}-{words[seconds[rng.integers(pool)]]}"
        if key in known:
            continue
        known.add(key)
        keys.append(key)
        values.append(_value(rng))
        write(f"{ANSWER_PREFIX.format(key=key)}{values[-1]}>\n")
        for _ in range(rng.poisson(asked)):
            ask(rng.random() < sentences)
    for index in range(closing):
        if index == 0:
            write(CLOSING)
        ask(index == 0 or rng.random() < sentences)
    return Record("".join(parts), tuple(questions))


def read_longeval(file: Path) -> list[Record]:
    """The published cases of LongEval, one JSON object a line, each with the start of the answer given.

    Raises:
        ValueError: a line that is not such a case.
    """
    records = []
    for number, line in enumerate(lines_of(read_text(file)), start=1):
        try:
            case = json.loads(line)
            key, position = case["random_idx"]
            answer = str(int(case["expected_number"]))
            text = case["prompt"] + ANSWER_PREFIX.format(key=key)
            distance = int(case["num_lines"]) - int(position)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is not a case of LongEval's line retrieval: {error!r}") from error
        question = Question(key, int(answer), len(text), len(text) + len(answer), distance)
        records.append(Record(f"{text}{answer}>\n", (question,)))
    return records
