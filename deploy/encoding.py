"""What an encoder gives, and how rows of different lengths share its calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import COUNTS, Row
from .manifest import ArrayInfo, BucketInfo, Manifest

OUTPUTS = ("last_hidden_state", "pooled", "logits", "scores")


@dataclass(frozen=True, eq=False)
class Encoding:
    """An encoder's results for one row of n tokens. What the model does not have, or was not asked for, is None.

    Attributes:
        tokens: n.
        last_hidden_state: float32 [n, hidden_size].
        pooled: float32 [hidden_size], the embedding of a sentence embedder, or the pooler's output of another model.
        logits: float32, [num_labels] from a classifier of whole rows, [n, num_labels] from one of tokens, [n, 2] (start
            and end) from a model that answers questions, [n, vocab_size] from a masked language model.
        scores: float32, of a classifier of whole texts: what `CrossEncoder.predict` of sentence-transformers returns,
            the logits after the activation that the model's files name (a sigmoid if they name none and there is one
            label). One number if there is one label, [num_labels] if there are more.
        labels: names of a classifier's classes, in the order of the logits; empty for other models.
        ids: int32 [n], the token ids; None for images and sound.
        offsets: int32 [n, 2], where each token begins and ends in its text, in characters, including the prompt before
            it; None if no text was given.
        sequence: int32 [n], 0 for tokens of the first text of a pair, 1 for those of the second, -1 for special tokens;
            None if no text was given.
        truncated: whether the text was truncated at the model's `max_seq_length`.
    """

    tokens: int
    last_hidden_state: NDArray[np.float32] | None
    pooled: NDArray[np.float32] | None
    logits: NDArray[np.float32] | None
    scores: NDArray[np.float32] | None
    labels: tuple[str, ...]
    ids: NDArray[np.int32] | None
    offsets: NDArray[np.int32] | None
    sequence: NDArray[np.int32] | None
    truncated: bool

    @property
    def label(self) -> str | list[str] | None:
        """The name of the most likely class, or a list with that of each token; None if the model does not classify."""
        if self.logits is None or not self.labels:
            return None
        best = self.logits.argmax(-1)
        return self.labels[best] if best.ndim == 0 else [self.labels[index] for index in best]


def check_truncate_dim(given: int | None, info: Manifest) -> int | None:
    """The numbers of an embedding to keep: what a caller asks for, or else the model's files.

    Raises:
        ValueError: not a whole number above 0, or the model is no sentence embedder.
    """
    text = info.model.text
    if given is None:
        return None if text is None else text.truncate_dim
    if text is None or not text.embedding:
        raise ValueError("truncate_dim is for sentence embedders, but this model is not one")
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise ValueError(f"truncate_dim is {given!r}, expected a whole number above 0")
    return int(given)


def check_outputs(outputs: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """The outputs to keep, all of them for None; ValueError if the model does not have one."""
    wanted = tuple(available) if outputs is None else tuple(outputs)
    unknown = [name for name in wanted if name not in available]
    if unknown:
        raise ValueError(f"outputs names {', '.join(unknown)}, but the model returns {', '.join(available)}")
    return wanted


def encode_rows(
    rows: Sequence[Row],
    info: Manifest,
    outputs: Sequence[str],
    truncate_dim: int | None,
    call: Callable[..., Sequence[Any]],
    progress: Callable[[int, int], None] | None,
) -> list[Encoding]:
    """Encodes rows, `batch` of similar length at a time, each such group in the smallest bucket that holds it.

    Args:
        rows: no longer than the largest bucket.
        info: of the artifact.
        outputs: names of the results to keep.
        truncate_dim: numbers of `pooled` to keep; None for all.
        call: takes a bucket, the entry's name and its arrays, and gives its results.
        progress: called with the rows done and the rows in all after each call.
    """
    # The longest first: what a call of the last group lacks in rows, it lacks in the smallest bucket.
    order = sorted(range(len(rows)), key=lambda index: -rows[index].tokens)
    encodings: dict[int, Encoding] = {}
    for start in range(0, len(order), info.batch):
        group = order[start : start + info.batch]
        members = [rows[index] for index in group]
        bucket = bucket_for(info, members[0].tokens)
        entry = bucket.entries["encode"]
        arrays = [_stack(members, name, array) for name, array in entry.arguments.items()]
        results = call(bucket, "encode", *arrays)
        kept = {name: np.asarray(array) for name, array in zip(entry.results, results, strict=True) if name in outputs}
        if "pooled" in kept:
            kept["pooled"] = kept["pooled"][:, :truncate_dim]
        for place, index in enumerate(group):
            encodings[index] = _encoding(rows[index], place, kept, info.model.labels)
        if progress:
            progress(len(encodings), len(rows))
    return [encodings[index] for index in range(len(rows))]


def bucket_for(info: Manifest, tokens: int) -> BucketInfo:
    """The smallest bucket with room for so many tokens, or the largest one."""
    return next((bucket for bucket in info.buckets if bucket.capacity >= tokens), info.buckets[-1])


def _stack(rows: Sequence[Row], name: str, info: ArrayInfo) -> NDArray[Any]:
    """One argument: zeros where a row has ended, and in rows that are not there."""
    stacked = np.zeros(info.shape, info.dtype)
    for place, row in enumerate(rows):
        if name in COUNTS:
            stacked[place] = row.count(name)
        else:
            array = row.arrays[name]
            stacked[(place, *(slice(size) for size in array.shape))] = array
    return stacked


def _encoding(row: Row, place: int, results: dict[str, NDArray[Any]], labels: tuple[str, ...]) -> Encoding:
    def of_row(name: str) -> NDArray[np.float32] | None:
        if name not in results:
            return None
        # Results of tokens have one dimension more than those of rows.
        array = results[name]
        found = array[place, : row.tokens] if array.ndim == 3 else array[place]
        return np.array(found[0] if name == "scores" and found.size == 1 else found, np.float32)

    named: dict[str, Any] = {name: of_row(name) for name in OUTPUTS}
    return Encoding(
        row.tokens,
        **named,
        labels=labels,
        ids=row.arrays.get("input_ids"),
        offsets=row.offsets,
        sequence=row.sequence,
        truncated=row.truncated,
    )
