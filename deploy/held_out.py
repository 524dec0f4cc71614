"""What a contract is judged on: prompts that nothing was calibrated on, and the positions in them that count."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from numpy.typing import ArrayLike

from .calibration import calibrating_tokens, calibration_ids, held_out_ids, is_task, read_tokenizer
from .examples import Question, read_examples
from .fidelity import first_of_last_quarter
from .manifest import CalibrationInfo
from .text_windows import Text, leading_tokens, windows_of
from .tokenization import TextTokenizer

WINDOWS = 2
"""Windows of the held-out text that a bucket is judged on, at most."""
EXAMPLES = 16
"""Examples of a task that a bucket is judged on, at most."""
_LEAST_TOKENS = 64
"""Of a window: its last quarter must say something."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and which of its predictions count.

    Attributes:
        ids: of its tokens.
        first: the first position that counts; each predicts the token behind it.
    """

    ids: Int32[np.ndarray, " tokens"]
    first: int


Prompts = Mapping[int, Sequence[Prompt]]
"""By the capacity of the bucket that is judged on them."""


def held_out_prompts(
    source: str | Path | ArrayLike | None,
    tokenizer_json: Path,
    vocab_size: int,
    max_tokens: int,
    judged: Sequence[int],
    weights: str = "same",
) -> tuple[Prompts, CalibrationInfo]:
    """Prompts for each bucket, and their record.

    Of a text, windows as long as the bucket, of which the last quarter counts: `WINDOWS` of what follows the tokens
    that calibrate, or the one that there is. Of a task, `EXAMPLES` whose smallest bucket it is, or as many as there
    are: the tokens of their answers count. The first context calibrates, and no question over it is asked.

    Args:
        source: as `compile` takes it for calibration.
        tokenizer_json: the checkpoint's tokenizer.json, which need not exist.
        vocab_size: ids must be below it.
        max_tokens: what the model takes at most.
        judged: capacities of the buckets, rising; with none of them nothing is judged.
        weights: their format.

    Raises:
        ValueError: a text without a window of each length, a task without an example of each, or a bucket that is too
            short to be judged.
    """
    if judged and judged[0] < _LEAST_TOKENS:
        raise ValueError(
            f"bucket {judged[0]} is too short to be judged by a contract, expected at least {_LEAST_TOKENS} tokens"
        )
    if is_task(source):
        return _of_task(Path(source), read_tokenizer(tokenizer_json, vocab_size), judged)
    calibrating = calibrating_tokens(max_tokens, weights)
    ids, info = held_out_ids(source, tokenizer_json, vocab_size, max_tokens, calibrating)
    if not judged:
        return {}, info
    tokenizer = read_tokenizer(tokenizer_json, vocab_size) if tokenizer_json.exists() else None
    leading = leading_tokens(tokenizer)
    longest = judged[-1] - leading.size
    if ids.size < longest:
        found = ids.size + calibration_ids(source, tokenizer_json, vocab_size, calibrating, calibrating)[1].tokens
        raise ValueError(
            f"calibration ({info.kind}) has {found} tokens, expected at least {calibrating + longest}: {calibrating} "
            f"that calibrate, and behind them {longest} on which bucket {judged[-1]} is judged: give calibration=FILE"
        )
    text = Text(info.kind, info.sha256, ids)
    counts = {capacity: min(WINDOWS, ids.size // (capacity - leading.size)) for capacity in judged}
    prompts = {
        capacity: [
            Prompt(window.ids, first_of_last_quarter(capacity))
            for window in windows_of([text], capacity, count, leading)
        ]
        for capacity, count in counts.items()
    }
    return prompts, info


def _of_task(file: Path, tokenizer: TextTokenizer, judged: Sequence[int]) -> tuple[Prompts, CalibrationInfo]:
    examples, leading = read_examples(file), leading_tokens(tokenizer)
    prompts: dict[int, list[Prompt]] = {capacity: [] for capacity in judged}
    contexts: dict[str, Int32[np.ndarray, " tokens"]] = {}
    others = [example for example in examples if example.context != examples[0].context]
    for example in others:
        if example.context not in contexts:
            context = tokenizer.encode(example.context, add_special_tokens=False).ids
            contexts[example.context] = np.concatenate([leading, context])
        question = Question.of(example, tokenizer)
        ids = np.concatenate([contexts[example.context], question.ids])
        bucket = next((capacity for capacity in judged if ids.size <= capacity), None)
        if bucket is not None and len(prompts[bucket]) < EXAMPLES:
            prompts[bucket].append(Prompt(ids, ids.size - question.answer - 1))
    for (capacity, found), shorter in zip(prompts.items(), (0, *judged), strict=False):
        if not found:
            raise ValueError(
                f"calibration ({file.name}) has no example of {shorter + 1} to {capacity} tokens for bucket {capacity} "
                f"among the {len(others)} behind its first context, which calibrates: give examples of that length, or "
                "leave the bucket out"
            )
    digest = hashlib.sha256(b"".join(prompt.ids.tobytes() for each in prompts.values() for prompt in each))
    tokens = sum(prompt.ids.size for each in prompts.values() for prompt in each)
    return prompts, CalibrationInfo("task", tokens, digest.hexdigest())
