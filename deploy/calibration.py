"""Calibrating the attention method: on which inputs, how the manifest names them, and what comes of it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32
from numpy.typing import ArrayLike, NDArray

from ..attention import Attention
from ..host.text import read_text
from ..model.encoder import Encoder
from ..model.registry import Model
from ..model.rope import Rope, RotaryTables, apply_rotary, rotary_tables
from ..model.self_attention import LayerConstants
from .artifact import TOKENIZER_CONFIG
from .examples import SUFFIX, read_examples
from .manifest import CalibrationInfo
from .tokenization import TextTokenizer

MAX_TOKENS = 4096
ROUNDING_TOKENS = 16384
"""Tokens of a text that weights are rounded with, at most."""
_PLACES = 4
"""Places in the longest row that the calibration text is moved to."""
DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")


@dataclass(frozen=True)
class CalibrationInputs:
    """One row for the model.

    Attributes:
        inputs: as the model's `queries_and_keys` takes them.
        tokens: how many the row has.
        info: their record.
    """

    inputs: Any
    tokens: int
    info: CalibrationInfo

    @property
    def is_text(self) -> bool:
        """Whether they are those of a text, not random."""
        return not self.info.kind.startswith("random")


def calibration_inputs(model: Model, source: str | Path | ArrayLike | None, tokenizer_json: Path) -> CalibrationInputs:
    """What a model is calibrated on: token ids as `calibration_ids` gives them, or, for a model of images or sound,
    seeded random numbers of the standard normal distribution.

    Raises:
        FileNotFoundError: no such text file.
        ValueError: as `calibration_ids`, and a source for a model that takes no tokens.
    """
    config: Any = model.config
    if isinstance(model, Encoder) and "input_ids" not in model.inputs(config.fixed_tokens or 1):
        return _random_inputs(model, source)
    ids, info = calibration_ids(source, tokenizer_json, config.vocab_size, config.max_tokens or MAX_TOKENS)
    return CalibrationInputs(inputs_of(model, ids[None]), ids.size, info)


def inputs_of(model: Model, ids: Int32[np.ndarray, "rows tokens"]) -> Any:
    """What a model of texts takes, as `queries_and_keys` does."""
    if not isinstance(model, Encoder):
        return ids
    # One segment, whose number is 0.
    infos = model.inputs(ids.shape[1]).items()
    return {name: np.zeros((len(ids), *info.shape), info.dtype) for name, info in infos} | {"input_ids": ids}


def calibration_ids(
    source: str | Path | ArrayLike | None,
    tokenizer_json: Path,
    vocab_size: int,
    max_tokens: int,
    most: int = MAX_TOKENS,
) -> tuple[NDArray[np.int32], CalibrationInfo]:
    """Ids [tokens], at most `max_tokens` and `most` of them, and their record.

    Args:
        source: a text file, a file of examples, whose first context counts, token ids, or None for the text that ships
            with the package (for a model without tokenizer: seeded random ids).
        tokenizer_json: the checkpoint's tokenizer.json, which need not exist.
        vocab_size: ids must be below it.
        max_tokens: what the model takes at most.
        most: what is asked for at most.

    Raises:
        FileNotFoundError: no such text file.
        ValueError: a text file for a model without tokenizer, no tokens at all, or an id outside the vocabulary.
    """
    kind, ids = _all_ids(source, tokenizer_json, vocab_size, max_tokens)
    return _recorded(kind, ids[: min(max_tokens, most)])


def held_out_ids(
    source: str | Path | ArrayLike | None, tokenizer_json: Path, vocab_size: int, max_tokens: int, calibrating: int
) -> tuple[NDArray[np.int32], CalibrationInfo]:
    """What of a text follows its first `calibrating` ids, which may be nothing, and its record.

    Other args and raises are those of `calibration_ids`.
    """
    kind, ids = _all_ids(source, tokenizer_json, vocab_size, max_tokens)
    return _recorded(kind, ids[calibrating:])


def is_task(source: object) -> TypeGuard[str | Path]:
    """Whether a source for calibration is a file of examples."""
    return isinstance(source, str | Path) and Path(source).suffix == SUFFIX


def calibrating_tokens(max_tokens: int, weights: str = "same") -> int:
    """Tokens of a text that calibrate, at most, a model that takes `max_tokens`, or that weights are rounded with."""
    return ROUNDING_TOKENS if weights == "int4" else min(max_tokens, MAX_TOKENS)


def _all_ids(
    source: str | Path | ArrayLike | None, tokenizer_json: Path, vocab_size: int, max_tokens: int
) -> tuple[str, NDArray[Any]]:
    """The kind of a text, and all of its ids."""
    if source is None and not tokenizer_json.exists():
        kind, ids = "random ids", np.random.default_rng(0).integers(0, vocab_size, calibrating_tokens(max_tokens))
    elif source is None:
        kind, ids = "default text", _encode(DEFAULT_TEXT, tokenizer_json, vocab_size)
    elif is_task(source):
        kind, ids = "task", _encode_context(Path(source), tokenizer_json, vocab_size)
    elif isinstance(source, str | Path):
        kind, ids = "text", _encode(Path(source), tokenizer_json, vocab_size)
    else:
        kind, ids = "ids", np.asarray(source)
    return kind, _check(ids, vocab_size)


def _recorded(kind: str, ids: NDArray[Any]) -> tuple[NDArray[np.int32], CalibrationInfo]:
    ids = ids.astype(np.int32)
    return ids, CalibrationInfo(kind, ids.size, hashlib.sha256(ids.tobytes()).hexdigest())


def calibrate(
    model: Model, strategies: Iterable[Attention], inputs: Any, tokens: int, *, longest: int
) -> LayerConstants:
    """The constants of each layer, from the model's queries and keys over one row with exact attention; none of layers
    with a sliding window, which attend exactly.

    A rotary embedding turns the slow pairs of dimensions little over a short text: what is learned there would not hold
    further on in a long one. So queries and keys count as they are, and as they would be at places up to `longest`.

    Args:
        model: the model.
        strategies: what is calibrated, once where several have one rule; a plan sees to it that what they learn under
            one name is the same.
        inputs: as the model's `queries_and_keys` takes them, of one row.
        tokens: of the row.
        longest: tokens of the longest row that will be attended to.
    """
    learners = {attention.rule: attention for attention in strategies}.values()
    graph, state = nnx.split(model)
    collect = jax.jit(lambda state, inputs, lengths: nnx.merge(graph, state).queries_and_keys(inputs, lengths))
    layers = collect(state, inputs, np.array([tokens], np.int32))

    # Layers with the same rotary embedding share its tables.
    moves = {rope: _moves(rope, model.config.head_dim, tokens, longest) for rope in dict.fromkeys(model.config.ropes)}

    def learn(query: Array, key: Array, rope: Rope | None) -> dict[str, Array]:
        arrays = [_at_places(x[0].astype(jnp.float32), moves[rope]) for x in (query, key)]
        learned = [attention.calibrate(*arrays) for attention in learners]
        return {name: jnp.asarray(array) for constants in learned for name, array in constants.items()}

    return tuple(
        learn(query, key, rope) if window is None else {}
        for (query, key), window, rope in zip(layers, model.config.windows, model.config.ropes, strict=True)
    )


def _moves(rope: Rope | None, head_dim: int, tokens: int, longest: int) -> RotaryTables | None:
    """What moves a row of so many tokens on by none, and up to the end of the longest row, at `_PLACES` places; None
    where nothing rotates or there is no room."""
    if rope is None or longest <= tokens:
        return None
    # What is there has been rotated once, and scaled then.
    rope = replace(rope, attention_factor=1.0)
    starts = jnp.linspace(0, longest - tokens, _PLACES).astype(jnp.int32)
    return rotary_tables(rope, head_dim, starts[:, None], jnp.full(_PLACES, tokens, jnp.int32))


def _at_places(
    x: Float[Array, "heads tokens head_dim"], moves: RotaryTables | None
) -> Float32[np.ndarray, "heads many head_dim"]:
    """The same queries or keys at all places; as they are where there are no moves."""
    if moves is None:
        return np.asarray(x)
    moved = apply_rotary(jnp.broadcast_to(x, (_PLACES, *x.shape)), moves)
    return np.asarray(jnp.moveaxis(moved, 0, 1).reshape(x.shape[0], -1, x.shape[2]))


def _random_inputs(model: Encoder, source: object) -> CalibrationInputs:
    tokens = model.config.fixed_tokens
    assert tokens is not None
    expected = model.inputs(tokens)
    if source is not None:
        raise ValueError(f"calibration is given, but the model takes {', '.join(expected)}, not text: leave it out")
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((1, *info.shape), np.float32) for name, info in expected.items()}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in inputs.values())).hexdigest()
    return CalibrationInputs(inputs, tokens, CalibrationInfo("random inputs", tokens, digest))


def read_tokenizer(tokenizer_json: Path, vocab_size: int | None) -> TextTokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json and the options beside it."""
    file = tokenizer_json.with_name(TOKENIZER_CONFIG)
    options = file.read_bytes() if file.exists() else None
    return TextTokenizer(tokenizer_json.read_bytes(), vocab_size, options=options)


def _encode(text: Path, tokenizer_json: Path, vocab_size: int) -> NDArray[Any]:
    return _tokenizer_for(text, tokenizer_json, vocab_size).encode(read_text(text)).ids


def _encode_context(task: Path, tokenizer_json: Path, vocab_size: int) -> NDArray[Any]:
    return _tokenizer_for(task, tokenizer_json, vocab_size).encode(read_examples(task)[0].context).ids


def _tokenizer_for(text: Path, tokenizer_json: Path, vocab_size: int) -> TextTokenizer:
    if not text.is_file():
        raise FileNotFoundError(f"{text} is not a file: calibration takes a text file or an array of token ids")
    if not tokenizer_json.exists():
        raise ValueError(f"the checkpoint has no tokenizer for the calibration text {text.name}: give token ids")
    return read_tokenizer(tokenizer_json, vocab_size)


def _check(ids: NDArray[Any], vocab_size: int) -> NDArray[Any]:
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"calibration has shape {ids.shape} and dtype {ids.dtype}, expected a 1-D array of at least one token id"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"calibration has ids {ids.min()}..{ids.max()}, expected ids from 0 to {vocab_size - 1}")
    return ids
