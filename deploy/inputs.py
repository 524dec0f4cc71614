"""What callers give to a session, checked: token ids of any model, and the rows of an encoder in all their forms."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .manifest import ArrayInfo, Manifest
from .tokenization import TextTokenizer

COUNTS = ("lengths", "prompt_lengths")
"""Arguments of an entry that are one number for each row, which callers do not give."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row for an encoder.

    Attributes:
        arrays: the model's inputs by name, without batch dimension and padding.
        tokens: how many the row has.
        prompt_tokens: how many of its first ones are the prompt's, where the model pools without them.
        offsets: int32 [tokens, 2], where in its text each token begins and ends; None if no text was given.
        sequence: int32 [tokens], which text of a pair each token is of, -1 for special tokens; None as `offsets`.
        truncated: whether its text was cut.
    """

    arrays: dict[str, NDArray[Any]]
    tokens: int
    prompt_tokens: int = 0
    offsets: NDArray[np.int32] | None = None
    sequence: NDArray[np.int32] | None = None
    truncated: bool = False

    def count(self, name: str) -> int:
        """One of `COUNTS`."""
        return {"lengths": self.tokens, "prompt_lengths": self.prompt_tokens}[name]


@dataclass(frozen=True)
class TextOptions:
    """What is done to texts on their way to tokens.

    Attributes:
        prompt: is put in front of each.
        asked: whether the caller asked for the prompt, which then may not be left out.
        truncate: whether a text that is longer than the model's `max_seq_length` is cut, or refused.
        add_special_tokens: as `TextTokenizer.encode` has it.
    """

    prompt: str = ""
    asked: bool = False
    truncate: bool = True
    add_special_tokens: bool | None = True


def choose_prompt(info: Manifest, prompt: str | None, prompt_name: str | None) -> str:
    """The text that goes in front of texts, as sentence-transformers resolves it: the prompt itself, or else the named
    one, or else the model's default.

    Raises:
        ValueError: a name that the model's prompts do not have, or a prompt for a model that takes no texts.
    """
    text = info.model.text
    if text is None:
        if prompt is not None or prompt_name is not None:
            raise ValueError(f"a prompt goes before texts, but the model ({info.model.model_type}) takes no texts")
        return ""
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}, expected text")
        if prompt_name is not None:
            warnings.warn(f"prompt_name {prompt_name!r} has no effect together with prompt", stacklevel=3)
        return prompt
    name = text.default_prompt_name if prompt_name is None else prompt_name
    if name is None:
        return ""
    if name not in text.prompts:
        names = ", ".join(text.prompts) or "(none)"
        raise ValueError(f"prompt_name is {name!r}, but the model's prompts are: {names}")
    return text.prompts[name]


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


def read_rows(
    inputs: Any, info: Manifest, tokenizer: Callable[[], TextTokenizer], options: TextOptions
) -> tuple[list[Row], bool]:
    """The rows of what an encoder is given, and whether it was a list of several.

    Args:
        inputs: as `Session.encode` takes them.
        info: of the artifact.
        tokenizer: gives the model's tokenizer, which cuts at its `max_seq_length`, or raises ValueError.
        options: for texts.

    Raises:
        ValueError: what does not fit the model; it names the row.
    """
    arguments = info.buckets[-1].entries["encode"].arguments
    expected = {name: array for name, array in arguments.items() if name not in COUNTS}
    reader = _Reader(info, expected, "prompt_lengths" in arguments, tokenizer, options)
    if isinstance(inputs, Mapping) and reader.holds_many(inputs):
        return [reader.row(one, f"input {index}") for index, one in enumerate(reader.split(inputs))], True
    if isinstance(inputs, list) and inputs and not isinstance(inputs[0], Integral):
        return [reader.row(one, f"input {index}") for index, one in enumerate(inputs)], True
    return [reader.row(inputs, "the input")], False


@dataclass(frozen=True)
class _Reader:
    """Reads rows for a model that takes the arrays `expected`, with a batch dimension, and perhaps counts prompts."""

    info: Manifest
    expected: dict[str, ArrayInfo]
    counts_prompts: bool
    tokenizer: Callable[[], TextTokenizer]
    options: TextOptions

    def row(self, given: Any, what: str) -> Row:
        """One text, pair of texts, array of ids, or mapping of arrays."""
        if not isinstance(given, Mapping) and "input_ids" not in self.expected:
            raise ValueError(f"{what} is {_kind_of(given)}, but the model takes {self._wanted()}")
        if isinstance(given, str):
            return self._text((given,), what)
        if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(text, str) for text in given):
            return self._text(tuple(given), what)
        if self.options.asked and self.options.prompt:
            raise ValueError(f"{what} is {_kind_of(given)}, but a prompt only goes before texts")
        return self._arrays(given if isinstance(given, Mapping) else {"input_ids": given}, what)

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
            raise ValueError(f"the input has rows {rows}, expected the same number in each array")
        return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]

    def _text(self, texts: tuple[str, ...], what: str) -> Row:
        options, text = self.options, self.info.model.text
        tokens = self.tokenizer().encode(
            options.prompt + texts[0], *texts[1:], add_special_tokens=options.add_special_tokens
        )
        if text is not None and tokens.truncated and not options.truncate:
            raise ValueError(
                f"{what} is longer than the {text.max_seq_length} tokens of the model's max_seq_length: shorten it, or "
                "leave truncate at True to have it truncated"
            )
        segments = text is None or text.segments
        arrays = {
            "input_ids": tokens.ids,
            "token_type_ids": tokens.type_ids if segments else np.zeros_like(tokens.ids),
        }
        row = self._arrays({name: arrays[name] for name in self.expected}, what)
        prompt_tokens = self._prompt_tokens if self.counts_prompts else 0
        return Row(row.arrays, row.tokens, prompt_tokens, tokens.offsets, tokens.sequence, tokens.truncated)

    @cached_property
    def _prompt_tokens(self) -> int:
        options = self.options
        return self.tokenizer().prompt_tokens(options.prompt, add_special_tokens=options.add_special_tokens)

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
    if isinstance(given, Mapping):
        return f"arrays {', '.join(map(str, given)) or '(none)'}"
    return "text" if isinstance(given, str | tuple) else f"{type(given).__name__} of shape {np.shape(given)}"
