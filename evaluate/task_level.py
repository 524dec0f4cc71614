"""The task level of an evaluation: questions over long contexts, with exact attention and every configuration."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..deploy.examples import Example, Question
from ..deploy.reader import TAIL, Reader
from ..deploy.text_windows import leading_tokens
from ..deploy.tokenization import TextTokenizer
from .answers import Answer
from .bench import Bench
from .evaluation_result import Evaluation
from .examples import HiddenAnswer, Setting
from .processes import Report
from .tasks import TASKS

LEVEL = "tasks"
Piece = tuple[str, int, int]
"""A task, tokens of the prompt, and number of the context."""


def ask_questions(work: Path, result: Evaluation, bench: Bench, report: Report) -> Evaluation:
    """Every question that has no answers yet."""
    options, tokenizer = bench.options, bench.tokenizer
    if not options.tasks:
        return replace(result, skipped={**result.skipped, LEVEL: "not asked for (tasks is empty)"})
    if not options.lengths:
        reason = f"windows of {options.tokens} tokens are too short, expected at least {2 * TAIL}"
        return replace(result, skipped={**result.skipped, LEVEL: reason})
    if tokenizer is None:
        return replace(result, skipped={**result.skipped, LEVEL: "the model has no tokenizer"})
    for task, tokens, sample in _pieces(options.tasks, options.lengths, options.samples):
        known = {a.configuration for a in result.answers if (a.task, a.tokens, a.sample) == (task, tokens, sample)}
        missing = [name for name in bench.configurations if name not in known]
        if not missing:
            continue
        examples = make_examples(bench, tokenizer, (task, tokens, sample))
        for name in missing:
            report(f"{task} at {tokens} tokens, context {sample + 1} of {options.samples}: {name}")
            found = answers_to(bench.reader(name), examples, tokenizer, tokens)
            made = [
                Answer(name, task, tokens, sample, depth, examples[depth].depth, known, right, logprob)
                for depth, known, right, logprob in found
            ]
            result = result.adding(answers=made)
            result.save(work)
    return result


def make_examples(bench: Bench, tokenizer: TextTokenizer, piece: Piece) -> list[HiddenAnswer]:
    """The examples of a task over one context, which depend on the seed, the task, the length and the number only."""
    task, tokens, sample = piece
    options = bench.options
    # Room for the call that reads the end of the context and the question.
    room = tokens - TAIL - leading_tokens(tokenizer).size
    depths = tuple((2 * index + 1) / (2 * options.depths) for index in range(options.depths))
    rng = np.random.default_rng([options.seed, zlib.crc32(task.encode()), tokens, sample])
    return TASKS[task](Setting(rng, tokenizer, room, depths, bench.filler(2 * tokens)))


def answers_to(
    reader: Reader, examples: Sequence[Example], tokenizer: TextTokenizer, tokens: int
) -> Iterator[tuple[int, bool, bool, float]]:
    """For each example its number, whether its question was known, whether the answer is right, and its
    log-probability. Examples have one context, which is read once, of prompts of at most so many tokens.
    """
    context = tokenizer.encode(examples[0].context, add_special_tokens=False).ids
    # Where texts were put together, there may be a token more than their own.
    context = np.concatenate([leading_tokens(tokenizer), context])[: tokens - TAIL]
    cache, whole = reader.prefill(context)
    for number, example in enumerate(examples):
        question = Question.of(example, tokenizer)
        ids = np.concatenate([context[whole:], question.ids])
        scores = reader.score(cache, whole, ids, known=True)
        for known in (True, False):
            if not known and reader.exact_last_block:
                scores = reader.score(cache, whole, ids, known=False)
            logprobs, argmax = (x[-question.answer :] for x in scores)
            yield number, known, bool(np.all(argmax == question.ids[-question.answer :])), float(np.sum(logprobs))


def _pieces(tasks: Sequence[str], lengths: Sequence[int], samples: int) -> Iterator[Piece]:
    return ((task, tokens, sample) for task in tasks for tokens in lengths for sample in range(samples))
