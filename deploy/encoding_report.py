"""Encodings for people, as JSON, and as files of arrays: what `iceformer encode` prints and writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..host.files import replacing
from .encoding import OUTPUTS, Encoding
from .manifest import Manifest

FORMATS = (".npy", ".npz")
_SHOWN = 5
"""Classes, and numbers of a vector, that are printed."""


def outputs_for(info: Manifest, out: Path | None) -> tuple[str, ...]:
    """The outputs of an artifact that a report or a file needs; a report has no use for vectors of tokens."""
    results = info.buckets[0].entries["encode"].results
    if out is not None and out.suffix == ".npz":
        return tuple(results)
    wanted = tuple(name for name in results if name != "last_hidden_state" and info.model.task != "masked_lm")
    return wanted or ("last_hidden_state",)


def lines_of(encoding: Encoding, info: Manifest, text: str | None) -> list[str]:
    """What to print of an encoding; `text` is what its offsets point into, None if it was not one text."""
    if encoding.labels and encoding.logits is not None:
        if encoding.logits.ndim == 1:
            return _classes(encoding, info)
        return _token_classes(encoding, info, text)
    lines = [] if encoding.pooled is None else [f"pooled: {_vector(encoding.pooled)}"]
    if encoding.logits is not None:
        lines.append(f"logits: {list(encoding.logits.shape)}")
    if not lines and encoding.last_hidden_state is not None:
        lines.append(f"last_hidden_state: {list(encoding.last_hidden_state.shape)}")
    return lines


def json_of(encoding: Encoding, info: Manifest) -> dict[str, Any]:
    """An encoding as JSON, without the vectors of tokens."""
    found: dict[str, Any] = {"tokens": encoding.tokens}
    if encoding.label is not None:
        found["label"] = encoding.label
    if encoding.labels and encoding.logits is not None and encoding.logits.ndim == 1:
        found["scores"] = dict(zip(encoding.labels, class_scores(encoding, info).tolist(), strict=True))
    if encoding.offsets is not None and isinstance(encoding.label, list):
        found["offsets"] = encoding.offsets.tolist()
    for name, array in (("pooled", encoding.pooled), ("logits", encoding.logits)):
        if array is not None:
            found[name] = array.tolist()
    return found


def class_scores(encoding: Encoding, info: Manifest) -> NDArray[np.floating[Any]]:
    """What a classifier of whole rows says of each class: its score if it has one label, else its probability."""
    assert encoding.logits is not None
    if encoding.scores is not None and encoding.scores.ndim == 0:
        return encoding.scores[None]
    return probabilities(encoding.logits, info)


def probabilities(logits: NDArray[np.float32], info: Manifest) -> NDArray[np.floating[Any]]:
    """What a classifier's logits say of its classes: softmax, a sigmoid each where several classes may hold, and the
    logit itself of a regression.
    """
    if info.model.config.get("problem_type") == "multi_label_classification":
        return np.float32(1) / (1 + np.exp(-logits))
    if logits.shape[-1] == 1:
        return logits
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def write_encodings(path: Path, encodings: Sequence[Encoding]) -> None:
    """Writes what was kept of encodings.

    An .npy file has one row for each input: the `scores` of a classifier of texts, else `pooled`, else the logits. An
    .npz file has all outputs by name, what is of tokens one input after the other, and `lengths`, the tokens of each.

    Raises:
        ValueError: another ending, or an .npy file of outputs that are of tokens.
    """
    if path.suffix == ".npz":
        kept = [name for name in OUTPUTS if getattr(encodings[0], name) is not None]
        arrays: dict[str, Any] = {name: _joined([getattr(one, name) for one in encodings]) for name in kept}
        with replacing(path) as file:
            np.savez(file, lengths=np.array([one.tokens for one in encodings], np.int32), **arrays)
        return
    choices = ([one.scores, one.pooled, one.logits] for one in encodings)
    rows = [next((array for array in arrays if array is not None), None) for arrays in choices]
    if path.suffix != ".npy" or any(row is None or row.ndim > 1 for row in rows):
        raise ValueError(f"{path} cannot hold what this model gives, expected a file that ends in .npz")
    with replacing(path) as file:
        np.save(file, np.stack([row for row in rows if row is not None]))


def _joined(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(arrays) if arrays[0].ndim <= 1 else np.concatenate(arrays)


def _classes(encoding: Encoding, info: Manifest) -> list[str]:
    values = class_scores(encoding, info)
    return [f"{values[index]:8.4f}  {info.model.labels[index]}" for index in np.argsort(-values)[:_SHOWN]]


def _token_classes(encoding: Encoding, info: Manifest, text: str | None) -> list[str]:
    """A line for each token that is of the text."""
    assert encoding.logits is not None
    values = probabilities(encoding.logits, info)
    lines = []
    for index, row in enumerate(values):
        if encoding.sequence is not None and encoding.sequence[index] < 0:
            continue
        token = str(index) if text is None or encoding.offsets is None else text[slice(*encoding.offsets[index])]
        best = int(row.argmax())
        lines.append(f"{row[best]:8.4f}  {info.model.labels[best]}  {token}")
    return lines


def _vector(vector: NDArray[np.float32]) -> str:
    numbers = " ".join(f"{value:.4f}" for value in vector[:_SHOWN])
    return f"{numbers} ... ({vector.size} numbers, norm {np.linalg.norm(vector):.4f})"
