"""`convert_checkpoint`: a Hugging Face folder in, a checkpoint folder out, whole or not at all."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from .. import __version__
from ..host.files import check_absent, new_folder
from ..host.interrupts import check as check_interrupt
from ..host.messages import joined, listed, plain_errors, shown
from ..host.terminal import Description, progress_bar
from ..model.decoder import DecoderConfig
from ..model.encoder import CLASSIFYING, EncoderConfig, unnamed_labels
from ..model.pooling import Dense
from ..model.registry import ModelConfig, abstract_module, build
from .adapter import Adapter, adapt, adapter_alone, has_adapter, open_adapter
from .auxiliary_files import CONFIG, check_auxiliary_files, copy_auxiliary_files, lowercase, tokenizer_of
from .checkpoint import FORMAT_VERSION, PARAMS, PROVENANCE, check_layers
from .decoder_task import as_embedder, settle_task
from .finite import all_finite
from .foreign import not_a_folder, without_config
from .generation_config import unapplied
from .gguf import copy_beside, find_gguf, open_gguf
from .hub import download, is_hub_id
from .json_file import read_json
from .layouts import TRANSPOSED
from .parameters import save_params, sha256_of
from .quantization import without_quantization
from .reader import Weights, check_dtypes, open_weights
from .rules import Path as ParameterPath
from .rules import Plan, Rule, Slot, check_names, dotted, make_plan, reaches
from .sentence_transformers import MODULES, SentenceFolder, open_sentence_folder
from .tables import rules_of
from .text import TEXT, TextSettings, text_settings

_DENSE = (Rule(r"linear\.weight", "kernel", TRANSPOSED), Rule(r"linear\.bias", "bias"))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Path:
    """Converts a Hugging Face folder, a hub model or a GGUF file to a checkpoint. Parameters keep their dtype.

    A decoder is converted to generate text if its config names a class that does, such as LlamaForCausalLM, or names
    none. It is converted to encode if the config names a base class or a classifier (LlamaModel,
    LlamaForSequenceClassification), or if the folder is a sentence embedder.

    Args:
        source: a folder with config.json, weights (model.safetensors, pytorch_model.bin, the shards of either with
            their index, or one other file from torch) and tokenizer files if there are any; or the name of a model on
            the hub, `organisation/name`, which is downloaded first; or a GGUF file (any file of a split one), or a
            folder with a GGUF file and no other weights.
        target: the checkpoint to write; parent folders are created.
        adapter: the folder of a LoRA adapter saved by PEFT, to merge into the weights. An adapter next to the weights
            in `source` is merged without being named.
        dtype: what the quantised tensors of a GGUF file become: "float32" (the default), which holds their values
            exactly, or "bfloat16" or "float16", which round them and take half of the memory.
        revision: branch, tag or commit hash of a model on the hub.
        progress: whether to show progress bars on stderr.

    Returns:
        The target.

    Raises:
        FileNotFoundError: the source or one of its files does not exist.
        FileExistsError: the target exists.
        PermissionError, ConnectionError: the hub refuses the model, or cannot be reached.
        ModuleNotFoundError: pickled weights without torch installed, or a GGUF file without gguf installed.
        ValueError: an unknown architecture or config field, a truncated or corrupt file, tensors that do not fit the
            config (all of them are listed), weights that are not finite, or a sentence embedder with modules that are
            not supported.
    """
    target = Path(target)
    check_absent(target)
    with plain_errors(), _opened(str(source), dtype, revision, progress) as (whole, origin, open_weights_of):
        return _convert(whole, origin, open_weights_of, target, adapter, progress)


def _convert(
    whole: Path,
    origin: dict[str, str],
    open_weights_of: Callable[[Path], Weights],
    target: Path,
    adapter: str | Path | None,
    progress: bool,
) -> Path:
    sentences = open_sentence_folder(whole)
    source = whole if sentences is None else sentences.root
    if has_adapter(source) and not (source / CONFIG).is_file():
        raise FileNotFoundError(adapter_alone(source))
    if not (source / CONFIG).exists():
        raise FileNotFoundError(without_config(source))
    auxiliary = check_auxiliary_files(source)
    given = read_json(source / CONFIG)
    pooled = sentences is not None and sentences.embedding is not None
    fields = as_embedder(given) if pooled else given
    architecture, config = build(fields)
    weights = open_weights_of(source)
    fields = without_quantization(fields, weights.tensors)
    check_layers(config, len(weights.tensors), source)
    rules = rules_of(architecture.table, config)
    check_names(rules, weights.tensors)
    if isinstance(config, DecoderConfig):
        fields = settle_task(fields, architecture, config, weights.tensors, pooled=pooled)
    elif _lacks_pooler(config, rules, weights.tensors):
        fields = {**fields, "add_pooling_layer": False}
    _, config = build(fields)
    for sentence in _doubts(source, fields, config):
        warnings.warn(sentence, stacklevel=2)
    settings = _text_settings(sentences, source, fields, config)
    rules = rules_of(architecture.table, config)
    tree: Any = flatten_dict(nnx.to_pure_dict(nnx.state(abstract_module(architecture, config, jnp.float32))))
    shapes = {path: leaf.shape for path, leaf in tree.items()}
    opened = _open_adapter(source, adapter)
    if opened is not None:
        weights = adapt(weights, opened, rules, shapes)
    _check_sizes(shapes, weights)
    plan = make_plan(rules, weights.tensors, shapes)
    check_dtypes(weights, [*plan.fills, *plan.ties])
    if plan.spare:
        _warn_of_spare(source, config.task, plan.spare)
    tokenizer = tokenizer_of(source, given, getattr(config, "vocab_size", None))
    params = _fill(weights, plan, shapes, progress)
    behind, files = ({}, ()) if sentences is None else _fill_dense(sentences)
    with new_folder(target) as folder:
        save_params(folder / PARAMS, unflatten_dict(params | behind))
        copy_auxiliary_files(source, folder, auxiliary, tokenizer)
        if sentences is not None and sentences.lowercases and tokenizer is not None:
            lowercase(folder)
        if settings is not None:
            (folder / TEXT).write_text(settings.to_json(), encoding="utf-8")
        if fields != given:
            (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        provenance = _provenance(origin, whole, (*weights.files, *files))
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return target


@contextmanager
def _opened(
    source: str, dtype: str | None, revision: str | None, progress: bool
) -> Iterator[tuple[Path, dict[str, str], Callable[[Path], Weights]]]:
    """The folder to convert, what the checkpoint says of where it came from, and what opens the weights of the folder.

    A GGUF file's config and tokenizer are written to a temporary folder.
    """
    if (file := find_gguf(Path(source))) is None:
        if dtype is not None:
            raise ValueError(f"dtype is {dtype}, but {source} is not a GGUF file: parameters keep their dtype")
        folder, origin = _resolve(source, revision, progress)
        yield folder, origin, _open_weights
        return
    if revision is not None:
        raise ValueError(
            f"revision is {revision!r}, but {source} is a local path: revision is only for models on the hub"
        )
    model = open_gguf(file)
    weights = model.weights(dtype or "float32")
    with TemporaryDirectory(prefix="iceformer-") as parent:
        folder = Path(parent) / file.name
        folder.mkdir()
        model.unpack(folder)
        if Path(source).is_dir():
            copy_beside(file, folder)
        yield folder, {"source": file.name}, lambda _: weights


def _resolve(source: str, revision: str | None, progress: bool) -> tuple[Path, dict[str, str]]:
    """The folder to convert, fetched from the hub if need be, and what the checkpoint says of where it came from."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {source} is a folder: revision is only for models on the hub"
            )
        return folder, {"source": folder.resolve().name}
    if folder.is_file():
        raise FileNotFoundError(not_a_folder(folder))
    if folder.exists() or not is_hub_id(source):
        raise FileNotFoundError(
            f"{source} is not a folder, expected a Hugging Face folder with {CONFIG} and weights, a GGUF file, or a "
            "model's name on the hub (organisation/name)"
        )
    snapshot = download(source, revision, progress=progress)
    return snapshot.folder, {"source": snapshot.name, "commit": snapshot.commit}


def _open_weights(source: Path) -> Weights:
    try:
        return open_weights(source)
    except FileNotFoundError:
        if has_adapter(source):
            raise FileNotFoundError(adapter_alone(source)) from None
        raise


def _open_adapter(source: Path, given: str | Path | None) -> Adapter | None:
    """The adapter that was given, or the one that lies beside the weights."""
    if given is None:
        return open_adapter(source) if has_adapter(source) else None
    if has_adapter(source):
        raise ValueError(f"adapter is {given}, but {source} has an adapter of its own: remove one of them")
    return open_adapter(Path(given))


def _doubts(source: Path, fields: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Sentences on what the folder's JSON files ask for and the checkpoint will not do."""
    if isinstance(config, DecoderConfig) and config.kind == "decoder":
        yield from unapplied(source, fields, config.vocab_size)
    if isinstance(config, DecoderConfig) and config.ignored:
        yield f"config: {', '.join(config.ignored)}, which has no effect on {config.model_type}, as in transformers"
    if config.task in CLASSIFYING and (unnamed := unnamed_labels(fields)):
        yield (
            f"config: id2label does not name all of the {config.num_labels} classes; the others are called "
            f"{joined(unnamed)}"
        )


def _warn_of_spare(source: Path, task: str, names: list[str]) -> None:
    modules = sorted({name.rpartition(".")[0] or name for name in names})
    warnings.warn(
        f"{shown(source)} holds heads that a model for {task.replace('_', ' ')} does not use; they are left out: "
        f"{joined(modules)}",
        stacklevel=3,
    )


def _text_settings(
    sentences: SentenceFolder | None, source: Path, fields: Mapping[str, Any], config: ModelConfig
) -> TextSettings | None:
    """Those of an encoder of text, None for another model."""
    if config.kind == "encoder" and config.fixed_tokens is None:
        return text_settings(sentences, source, fields, config)
    if sentences is not None:
        raise ValueError(
            f"{MODULES} asks for embeddings or scores of texts, but {config.model_type} "
            f"{'takes no texts' if config.fixed_tokens else 'generates text'}: remove {MODULES} to convert it for that"
        )
    return None


def _lacks_pooler(config: EncoderConfig, rules: tuple[Rule, ...], tensors: Iterable[str]) -> bool:
    """Whether a model without a task head would have a pooler, of which the checkpoint has no tensor."""
    if not config.pooler or config.task != "features":
        return False
    return not any(reaches(rules, name, "pooler") for name in tensors)


def _check_sizes(shapes: Mapping[ParameterPath, tuple[int, ...]], weights: Weights) -> None:
    """ValueError that lists the parameters which are larger than all that the files hold."""
    numbers = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    if large := [f"{dotted(path)} {list(shape)}" for path, shape in shapes.items() if math.prod(shape) > numbers]:
        raise ValueError(
            f"the config asks for parameters that are larger than all tensors together, which hold {numbers} numbers:"
            f"{listed(large)}"
        )


def _fill(
    weights: Weights, plan: Plan, shapes: Mapping[ParameterPath, tuple[int, ...]], progress: bool
) -> dict[ParameterPath, Any]:
    """The parameters as arrays on the CPU device."""
    params: dict[ParameterPath, Any] = {}
    stacks: dict[ParameterPath, np.ndarray] = {}
    broken, overflowed = [], []
    for name, stored in _tracked(weights, progress):
        destination = plan.fills.get(name)
        # Constants that are left out may be infinite: masks, in half precision.
        if destination is None and name not in plan.ties:
            continue
        tensor = _narrowed(stored)
        if not all_finite(tensor):
            (overflowed if all_finite(stored) else broken).append(name)
        if destination:
            pieces = destination.layout.pieces(tensor, [slot.shape(shapes) for slot in destination.slots])
            for slot, piece in zip(destination.slots, pieces, strict=True):
                if slot.row is None:
                    params[slot.path] = _put(piece)
                else:
                    _stack(stacks, slot, shapes[slot.path], piece)
    if broken:
        raise ValueError(f"NaN or infinite values in:{listed(sorted(broken))}")
    if overflowed:
        raise ValueError(f"values of float64 that are beyond the range of float32 in:{listed(sorted(overflowed))}")
    while stacks:
        path, stack = stacks.popitem()
        params[path] = _put(stack)
    for name, path in plan.ties.items():
        if not np.array_equal(_narrowed(weights.read_one(name)), params[path]):
            raise ValueError(
                f"{name} differs from the tensor of {dotted(path)}, but the model has one for both: keep the right "
                "one, or set tie_word_embeddings to false if it is an output layer of its own"
            )
    return params


def _fill_dense(sentences: SentenceFolder) -> tuple[dict[ParameterPath, Any], tuple[Path, ...]]:
    """The parameters of a sentence embedder's dense layers, and the files that they come from."""
    params: dict[ParameterPath, Any] = {}
    files: list[Path] = []
    steps = [] if sentences.embedding is None else sentences.embedding.steps
    layers = [step for step in steps if isinstance(step, Dense)]
    for index, (layer, folder) in enumerate(zip(layers, sentences.dense, strict=True)):
        shapes: dict[ParameterPath, tuple[int, ...]] = {("kernel",): (layer.in_features, layer.out_features)}
        if layer.use_bias:
            shapes["bias",] = (layer.out_features,)
        weights = open_weights(folder)
        try:
            plan = make_plan(_DENSE, weights.tensors, shapes)
            check_dtypes(weights, plan.fills)
            filled = _fill(weights, plan, shapes, progress=False)
        except ValueError as error:
            raise ValueError(f"{folder.name}: {error}") from error
        params |= {("sentence_embedding", "dense", index, *path): array for path, array in filled.items()}
        files += weights.files
    return params, tuple(files)


def _narrowed(tensor: np.ndarray) -> np.ndarray:
    """The tensor, in float32 if it is in float64; what is beyond its range is infinite then."""
    with np.errstate(over="ignore"):
        return tensor.astype(np.float32) if tensor.dtype == np.float64 else tensor


def _put(array: np.ndarray) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(array), jax.devices("cpu")[0])


def _stack(stacks: dict[ParameterPath, np.ndarray], slot: Slot, shape: tuple[int, ...], piece: np.ndarray) -> None:
    """Writes one row of a parameter that several tensors fill."""
    if slot.path not in stacks:
        stacks[slot.path] = np.empty(shape, piece.dtype)
    elif (dtype := jnp.promote_types(stacks[slot.path].dtype, piece.dtype)) != stacks[slot.path].dtype:
        stacks[slot.path] = stacks[slot.path].astype(dtype)  # Rows of several dtypes go into one that holds them all.
    stacks[slot.path][slot.row] = piece


def _tracked(weights: Weights, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, with a progress bar if wanted."""
    columns = (Description(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress_bar(*columns, disable=not progress) as bar:
        for item in bar.track(weights.read(), total=len(weights.tensors), description="Converting"):
            check_interrupt()
            yield item


def _provenance(origin: dict[str, str], source: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Where a checkpoint comes from: the files by their place in the source, or by name where they are outside."""
    names = {file: file.relative_to(source).as_posix() if file.is_relative_to(source) else file.name for file in files}
    return {
        "format": FORMAT_VERSION,
        "iceformer": __version__,
        **origin,
        "sha256": {name: sha256_of(file) for file, name in names.items()},
    }
