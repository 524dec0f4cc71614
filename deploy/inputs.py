"""What callers give to a session, checked: token ids of any model, and the rows of an encoder in all their forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .manifest import ArrayInfo, Manifest
from .tokenization import Tokens


@dataclass(frozen=True, eq=False)
class Row:
    """One row for an encoder.

    Attributes:
        arrays: the model's inputs by name, without batch dimension and padding.
        tokens: how many the row has.
        offsets: int32 [tokens, 2], where in its text each token begins and ends; None if no text was given.
        sequence: int32 [tokens], which text of a pair each token is of, -1 for special tokens; None as `offsets`.
    """

    arrays: dict[str, NDArray[Any]]
    tokens: int
    offsets: NDArray[np.int32] | None = None
    sequence: NDArray[np.int32] | None = None


def check_ids(ids: Any, what: str, info: Manifest) -> NDArray[np.int32]:
    """Token ids as an int32 array that the executables can take.

    Raises:
        ValueError: no ids, not a 1-D array of integers, an id outside the vocabulary, or more than a bucket takes.
    """
    array = _array(ids, what)
    if array.size == 0:
        raise ValueError(f"{what} is empty, expected at least one token")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} has shape {array.shape} and dtype {array.dtype}, expected 1-D integers")
    vocabulary = info.model.vocab_size
    assert vocabulary is not None
    _check_range(array, vocabulary, what, "token id", "ids")
    largest = info.buckets[-1].capacity
    if array.size > largest:
        limit = info.model.max_tokens
        larger = limit is None or limit > largest
        raise ValueError(
            f"{what} has {array.size} tokens and the largest bucket takes {largest}: "
            f"shorten it{', or compile the checkpoint with a larger bucket' if larger else ''}"
        )
    return array.astype(np.int32)


def is_nested(ids: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list of several texts or sequences of ids, rather than one."""
    if not isinstance(ids, list | tuple) or not ids:
        return False
    return isinstance(ids[0], str | list | tuple) or getattr(ids[0], "ndim", 0) > 0


def check_count(value: Any, name: str, least: int) -> int:
    """An integer that is at least so large; ValueError for others and for what is no integer."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return int(value)


def read_rows(inputs: Any, info: Manifest, tokenize: Callable[..., Tokens]) -> tuple[list[Row], bool]:
    """The rows of what an encoder is given, and whether it was a list of several.

    Args:
        inputs: as `Session.encode` takes them.
        info: of the artifact.
        tokenize: gives the tokens of a text or of a pair of texts, or raises ValueError.

    Raises:
        ValueError: what does not fit the model; it names the row.
    """
    expected = {
        name: array for name, array in info.buckets[-1].entries["encode"].arguments.items() if name != "lengths"
    }
    reader = _Reader(info, expected, tokenize)
    if isinstance(inputs, Mapping) and reader.holds_many(inputs):
        return [reader.row(one, f"input {index}") for index, one in enumerate(reader.split(inputs))], True
    if isinstance(inputs, list) and inputs and not isinstance(inputs[0], Integral):
        return [reader.row(one, f"input {index}") for index, one in enumerate(inputs)], True
    return [reader.row(inputs, "the input")], False


@dataclass(frozen=True)
class _Reader:
    """Reads rows for a model that takes the arrays `expected`, with a batch dimension."""

    info: Manifest
    expected: dict[str, ArrayInfo]
    tokenize: Callable[..., Tokens]

    def row(self, given: Any, what: str) -> Row:
        """One text, pair of texts, array of ids, or mapping of arrays."""
        if isinstance(given, Mapping):
            return self._arrays(given, what)
        if "input_ids" not in self.expected:
            raise ValueError(f"{what} is {_kind_of(given)}, but the model takes {self._wanted()}")
        if isinstance(given, str):
            return self._text((given,), what)
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given):
            return self._text(given, what)
        return self._arrays({"input_ids": given}, what)

    def holds_many(self, given: Mapping[str, Any]) -> bool:
        """Whether the arrays have a batch dimension."""
        return any(
            name in self.expected and _depth(array) == len(self.expected[name].shape) for name, array in given.items()
        )

    def split(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of arrays with a batch dimension."""
        counts = {name: len(array) for name, array in given.items()}
        if len(set(counts.values())) > 1:
            rows = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"the input has rows {rows}, expected as many of each")
        return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]

    def _text(self, texts: tuple[str, ...], what: str) -> Row:
        tokens = self.tokenize(*texts)
        arrays = {"input_ids": tokens.ids, "token_type_ids": tokens.type_ids}
        row = self._arrays({name: arrays[name] for name in self.expected}, what)
        return Row(row.arrays, row.tokens, tokens.offsets, tokens.sequence)

    def _arrays(self, given: Mapping[str, Any], what: str) -> Row:
        optional = {"token_type_ids"}
        if given.keys() - self.expected.keys() or self.expected.keys() - given.keys() - optional:
            raise ValueError(f"{what} has {', '.join(given) or 'nothing'}, but the model takes {self._wanted()}")
        fixed = self.info.model.fixed_tokens
        if fixed is not None:
            return Row({name: self._fixed(array, name, what) for name, array in given.items()}, fixed)
        ids = check_ids(given["input_ids"], what, self.info)
        arrays = {name: np.zeros_like(ids) for name in self.expected} | {"input_ids": ids}
        if "token_type_ids" in given:
            arrays["token_type_ids"] = self._token_types(given["token_type_ids"], ids.shape, what)
        return Row(arrays, ids.size)

    def _fixed(self, given: Any, name: str, what: str) -> NDArray[Any]:
        array, wanted = np.asarray(given), self.expected[name]
        if array.shape != wanted.shape[1:] or array.dtype.kind not in "fiu":
            raise ValueError(
                f"{what} has {name} of shape {array.shape} and dtype {array.dtype}, expected numbers of shape "
                f"{wanted.shape[1:]}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{what} has {name} with NaN or infinite values")
        if name == "input_ids":
            return check_ids(array, what, self.info)
        return array.astype(wanted.dtype)

    def _token_types(self, given: Any, shape: tuple[int, ...], what: str) -> NDArray[np.int32]:
        array = np.asarray(given)
        if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{what} has token_type_ids of shape {array.shape} and dtype {array.dtype}, expected integers of shape "
                f"{shape}, one for each token"
            )
        _check_range(array, self.info.model.config.get("type_vocab_size", 2), what, "token type", "types")
        return array.astype(np.int32)

    def _wanted(self) -> str:
        fixed = self.info.model.fixed_tokens is not None
        return ", ".join(
            f"{name} {list(array.shape[1:]) if fixed else '[tokens]'}" for name, array in self.expected.items()
        )


def _check_range(array: NDArray[Any], limit: int, what: str, name: str, plural: str) -> None:
    bad = np.flatnonzero((array < 0) | (array >= limit))
    if bad.size:
        first = bad[0]
        raise ValueError(
            f"{what} has {name} {array[first]} at position {first}, expected {plural} from 0 to {limit - 1}"
        )


def _array(given: Any, what: str) -> NDArray[Any]:
    """As an array; ValueError, with its type, for what is none."""
    if isinstance(given, bytes | bytearray):
        raise ValueError(f"{what} is bytes, expected text or token ids: decode it first")
    if isinstance(given, list | tuple) and any(isinstance(item, str) for item in given):
        raise ValueError(f"{what} is a {type(given).__name__} with texts, expected one text, or token ids")
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, OverflowError):
        array = np.empty((), object)
    if array.dtype.kind in "OUS":
        raise ValueError(f"{what} is a {type(given).__name__}, expected text, or token ids as a 1-D array or list")
    return array


def _depth(array: Any) -> int:
    """Dimensions of an array, or of nested lists whose rows may have different lengths."""
    depth = 0
    while isinstance(array, list | tuple) and len(array):
        array, depth = array[0], depth + 1
    return depth + np.ndim(array)


def _kind_of(given: Any) -> str:
    return "text" if isinstance(given, str | tuple) else f"{type(given).__name__} of shape {np.shape(given)}"
