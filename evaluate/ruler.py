"""RULER's synthetic tasks (Hsieh et al., arXiv 2404.06654): needles with one or several keys, values or queries,
variables to track, words to count.

RULER looks for each answer somewhere in what a model writes. Here the answer is compared token by token, so that where
several belong together they come in one order, which the question asks for.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from .examples import HiddenAnswer, Setting, facts, grass, hide
from .line_retrieval import pseudo_words

_NEEDLE = "One of the special magic numbers for {} is: {}. "
_VALUES, _QUERIES, _HOPS = 4, 4, 4
_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_TOP = 3
"""Words that a list is asked for."""


def needle(setting: Setting) -> list[HiddenAnswer]:
    """Numbers of seven digits in ordinary text, one at each depth (`niah_single_2`)."""
    return _of_names(setting, 1)


def multi_key(setting: Setting) -> list[HiddenAnswer]:
    """A text of nothing but needles, of which each question asks for one (`niah_multikey_2`)."""
    seed, words = int(setting.rng.integers(2**31)), pseudo_words(setting.rng, 2000)

    def make(count: int) -> tuple[list[tuple[str, int]], str]:
        rng = np.random.default_rng(seed)
        names = [f"{words[a]}-{words[b]}" for a, b in rng.integers(len(words), size=(2 * count, 2))]
        kept = list(dict.fromkeys(names))[:count]
        pairs = [(name, int(number)) for name, number in zip(kept, rng.integers(10**6, 10**7, len(kept)), strict=True)]
        return pairs, "".join(_NEEDLE.format(*pair) for pair in pairs)

    pairs, context = setting.longest(make)
    return [
        _asked(context, [pairs[place][0]], [pairs[place][1]], place / len(pairs)) for place in setting.among(len(pairs))
    ]


def multi_value(setting: Setting) -> list[HiddenAnswer]:
    """Names with several numbers each, which a question asks for in the order of the text (`niah_multivalue`)."""
    names, _ = facts(setting, 7)
    numbers = setting.rng.integers(10**6, 10**7, (len(names), _VALUES)).tolist()
    context, places = _hide_several(
        setting,
        setting.filler,
        [[_NEEDLE.format(name, number) for number in row] for name, row in zip(names, numbers, strict=True)],
    )
    return [_asked(context, [name], row, place) for name, row, place in zip(names, numbers, places, strict=True)]


def multi_query(setting: Setting) -> list[HiddenAnswer]:
    """Questions for several names at once (`niah_multiquery`), the first of which is that of the depth."""
    return _of_names(setting, _QUERIES)


def _of_names(setting: Setting, asked: int) -> list[HiddenAnswer]:
    """Questions for the numbers of so many names, the first of which is that of the depth."""
    names, numbers = facts(setting, 7)
    hidden = [_NEEDLE.format(*pair) for pair in zip(names, numbers, strict=True)]
    context, places = hide(setting, setting.filler, hidden, setting.depths)
    count = min(asked, len(names))
    chosen = [[(first + step) % len(names) for step in range(count)] for first in range(len(names))]
    return [
        _asked(context, [names[i] for i in group], [numbers[i] for i in group], place)
        for group, place in zip(chosen, places, strict=True)
    ]


def variable_tracking(setting: Setting) -> list[HiddenAnswer]:
    """Chains of variables that take each other's value, one from each depth on; asked for are all of a chain."""
    count, length = len(setting.depths), _HOPS + 1
    names = _variables(setting.rng, count * length)
    chains = [names[first : first + length] for first in range(0, len(names), length)]
    values = [int(value) for value in setting.rng.choice(90000, count, replace=False) + 10000]
    statements = [
        [f"VAR {chain[0]} = {value}. ", *(f"VAR {b} = VAR {a}. " for a, b in itertools.pairwise(chain))]
        for chain, value in zip(chains, values, strict=True)
    ]
    context, places = _hide_several(setting, grass(setting), statements)
    return [
        HiddenAnswer(
            context,
            f"Find all variables that are assigned the value {value} in the text above, in the order of the text.",
            f"According to the chain of variable assignment in the text above, {length} variables are assigned the "
            f"value {value}, they are:",
            " " + ", ".join(chain),
            48,
            place,
        )
        for chain, value, place in zip(chains, values, places, strict=True)
    ]


def common_words(setting: Setting) -> list[HiddenAnswer]:
    """A numbered list in which a few words stand many times more often than the others; asked for are these (`cwe`)."""
    return _most_frequent(
        setting,
        lambda count: [*(36 - 6 * rank for rank in range(_TOP)), *[3] * count],
        "Below is a numbered list of words. In these words, some appear more often than others.\n",
        lambda words: " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)),
    )


def frequent_words(setting: Setting) -> list[HiddenAnswer]:
    """Coded words whose counts fall with the square of their rank; asked for are the most frequent (`fwe`)."""
    return _most_frequent(
        setting,
        lambda count: [max(1, count // (rank + 1) ** 2) for rank in range(count)],
        "Read the following coded text and track the frequency of each coded word.\n",
        " ... ".join,
    )


def _most_frequent(
    setting: Setting, counts_of: Callable[[int], list[int]], introduction: str, written: Callable[[list[str]], str]
) -> list[HiddenAnswer]:
    """One question for the most frequent words of a list, as long as fits."""
    seed = int(setting.rng.integers(2**31))
    words = setting.rng.permutation(pseudo_words(setting.rng, setting.tokens // 4))

    def make(size: int) -> tuple[list[str], str]:
        counts = counts_of(size)[: words.size]
        order = np.random.default_rng(seed).permutation(np.repeat(words[: len(counts)], counts))
        return words[:_TOP].tolist(), introduction + written(order.tolist())

    top, context = setting.longest(make)
    question = f"What are the {_TOP} words that appear most often in the list above, the most frequent first?"
    prefix = f"The {_TOP} words that appear most often in the list are:"
    return [HiddenAnswer(context, question, prefix, " " + ", ".join(top), 48, 0.0)]


def _asked(context: str, names: Sequence[str], numbers: Sequence[int], place: float) -> HiddenAnswer:
    """The question for the numbers of some names, in their order."""
    several = len(numbers) > 1
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    noun, verb = ("numbers", "are") if several else ("number", "is")
    subject = f"special magic {noun} for {listed} mentioned in the provided text"
    question = f"What {verb} {'all ' * several}the {subject}{', in their order' * several}?"
    return HiddenAnswer(
        context, question, f"The {subject} {verb}", " " + ", ".join(map(str, numbers)), 24 * len(numbers), place
    )


def _hide_several(setting: Setting, filler: str, groups: Sequence[Sequence[str]]) -> tuple[str, list[float]]:
    """The filler with the texts of each group spread from the group's depth to the end; and the groups' places."""
    spread = [
        (depth + (1 - depth) * step / len(texts), group, text)
        for group, (depth, texts) in enumerate(zip(setting.depths, groups, strict=True))
        for step, text in enumerate(texts)
    ]
    spread.sort(key=lambda each: each[0])
    context, places = hide(setting, filler, [text for *_, text in spread], [depth for depth, *_ in spread])
    first: dict[int, float] = {}
    for (_, group, _), place in zip(spread, places, strict=True):
        first.setdefault(group, place)
    return context, [first[group] for group in range(len(groups))]


def _variables(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(_LETTERS, 5))] = None
    return list(names)
