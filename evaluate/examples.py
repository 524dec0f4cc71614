"""Questions over a long context, generated from a seed: passkey, line and key-value retrieval, repetition.

Examples with one context are second questions over it.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..deploy.examples import Example
from ..deploy.tokenization import TextTokenizer
from .line_retrieval import ANSWER_PREFIX, CLOSING, QUESTION, Made, Record, longest_fit, make_record, pseudo_words

_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_CITIES = (
    "Amsterdam Athens Auckland Berlin Bogota Brussels Cairo Chicago Copenhagen Dublin Geneva Helsinki Istanbul Jakarta "
    "Lagos Lima Lisbon London Madrid Manila Montreal Moscow Mumbai Nairobi Oslo Paris Prague Rome Santiago Seoul "
    "Shanghai Stockholm Sydney Tehran Tokyo Toronto Vienna Warsaw Zagreb Zurich"
)
_SENTENCE_END = re.compile(r"[.!?]\W*\s")
_WORDS = 4000
_BEGINNING, _REPEATED = 8, 16
"""Words of a passage that are given, and that are to be repeated."""


@dataclass(frozen=True)
class HiddenAnswer(Example):
    """A question whose answer stands somewhere in the context.

    Attributes:
        depth: share of the context that stands before what the question asks for.
    """

    depth: float


@dataclass(frozen=True, eq=False)
class Setting:
    """What a task makes its examples from.

    Attributes:
        rng: chooses names and numbers.
        tokenizer: counts tokens.
        tokens: that the context has at most, and nearly.
        depths: at which the answers are to stand, rising shares of the context.
        filler: ordinary text of more tokens.
    """

    rng: np.random.Generator
    tokenizer: TextTokenizer
    tokens: int
    depths: tuple[float, ...]
    filler: str

    def count(self, text: str) -> int:
        """The tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids.size

    def longest(self, make: Callable[[int], tuple[Made, str]]) -> tuple[Made, str]:
        """What is made of as many pieces as fit, with its text."""
        return longest_fit(make, lambda made: self.count(made[1]), self.tokens)[0]

    def among(self, count: int) -> list[int]:
        """Of so many pieces in a row, those at the depths."""
        return [min(int(depth * count), count - 1) for depth in self.depths]


def passkey(setting: Setting) -> list[HiddenAnswer]:
    """Keys of five digits in a text that repeats itself (Mohtashami and Jaggi, arXiv 2305.16300), one at each depth."""
    names, numbers = facts(setting, 5)
    hidden = [
        f"The pass key of {name} is {number}. Remember it. {number} is the pass key of {name}. "
        for name, number in zip(names, numbers, strict=True)
    ]
    context, depths = hide(setting, grass(setting), hidden, setting.depths)
    return [
        HiddenAnswer(context, f"What is the pass key of {name}?", f"The pass key of {name} is", f" {number}", 16, depth)
        for name, number, depth in zip(names, numbers, depths, strict=True)
    ]


def lines(setting: Setting) -> list[HiddenAnswer]:
    """LongEval's line retrieval: a record of lines, and the values of those that stand nearest to each depth."""
    words = pseudo_words(setting.rng, _WORDS)
    seed = int(setting.rng.integers(2**31))

    def make(count: int) -> tuple[Record, str]:
        record = make_record(np.random.default_rng(seed), count, words, closing=16 * len(setting.depths))
        return record, record.text[: record.text.index(CLOSING)]

    (record, context), count = longest_fit(make, lambda made: setting.count(made[1]), setting.tokens)
    found = [(1 - question.distance / count, question) for question in record.questions]
    nearest = [min(found, key=lambda each: abs(each[0] - depth)) for depth in setting.depths]
    return [
        HiddenAnswer(
            context,
            CLOSING.strip() + " " + QUESTION.format(key=question.key).strip(),
            ANSWER_PREFIX.format(key=question.key),
            f"{question.value}>",
            16,
            depth,
        )
        for depth, question in nearest
    ]


def key_value(setting: Setting) -> list[HiddenAnswer]:
    """A JSON object of random keys and values (Liu et al., "Lost in the Middle", arXiv 2307.03172), and the values of
    the keys that stand nearest to each depth."""
    seed = int(setting.rng.integers(2**31))

    def make(count: int) -> tuple[list[tuple[str, str]], str]:
        words = np.random.default_rng(seed).integers(2**32, size=(count, 2))
        pairs = [(f"{key:08x}", f"{value:08x}") for key, value in words]
        return pairs, "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"

    pairs, context = setting.longest(make)
    return [
        HiddenAnswer(
            context,
            "Extract the value of the specified key from the JSON object above.",
            f'Key: "{pairs[place][0]}"\nCorresponding value: "',
            f'{pairs[place][1]}"',
            24,
            place / len(pairs),
        )
        for place in setting.among(len(pairs))
    ]


def repetition(setting: Setting) -> list[HiddenAnswer]:
    """Passages of ordinary text to repeat, by their first words (Ribar et al., SparQ, arXiv 2312.04985)."""
    offsets = setting.tokenizer.encode(setting.filler, add_special_tokens=False).offsets
    context = setting.filler[: offsets[setting.tokens - 1][1]]
    words = list(re.finditer(r"\S+", context))
    examples = []
    for depth in setting.depths:
        first = int(depth * len(words)) + int(setting.rng.integers(_REPEATED))
        first = min(first, len(words) - _BEGINNING - _REPEATED)
        begin, given, end = (words[first + count].start() for count in (0, _BEGINNING, _BEGINNING + _REPEATED - 1))
        beginning, passage = context[begin:given].rstrip(), context[given:end].rstrip()
        question = f"Repeat the passage of the text that begins with: {' '.join(beginning.split())}"
        examples.append(HiddenAnswer(context, question, beginning, f" {passage}", 64, begin / len(context)))
    return examples


def grass(setting: Setting) -> str:
    """A text that repeats itself, more than long enough."""
    return _GRASS * (2 * setting.tokens // setting.count(_GRASS) + 1)


def facts(setting: Setting, digits: int) -> tuple[list[str], list[int]]:
    """A name and a number for each depth."""
    count = len(setting.depths)
    cities = _CITIES.split()
    if count > len(cities):
        raise ValueError(f"there are {count} depths, expected at most {len(cities)}")
    names = [str(name) for name in setting.rng.choice(cities, count, replace=False)]
    numbers = setting.rng.integers(10 ** (digits - 1), 10**digits, count)
    return names, [int(number) for number in numbers]


def hide(setting: Setting, filler: str, hidden: Sequence[str], depths: Sequence[float]) -> tuple[str, list[float]]:
    """The filler, cut to length, with each text between two of its sentences nearest to its depth, which rise; and
    these depths."""
    room = setting.tokens - sum(setting.count(text) + 2 for text in hidden)
    offsets = setting.tokenizer.encode(filler, add_special_tokens=False).offsets
    if room < 1 or len(offsets) < room:
        raise ValueError(
            f"a context of {setting.tokens} tokens needs {max(room, 1)} tokens of filler, and there are {len(offsets)}"
        )
    filler = filler[: offsets[room - 1][1]]
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(filler))]
    places = [_nearest(ends, depth * len(filler)) for depth in depths]
    parts, last = [], 0
    for place, text in zip(places, hidden, strict=True):
        parts += [filler[last:place], text]
        last = place
    return "".join([*parts, filler[last:]]), [place / len(filler) for place in places]


def _nearest(rising: Sequence[int], wanted: float) -> int:
    """The number nearest to a wanted one."""
    index = bisect_left(rising, wanted)
    return min(rising[max(index - 1, 0) : index + 1], key=lambda number: abs(number - wanted))
