"""The checkpoint: a folder with Orbax parameters, the config and tokenizer files of its source, and where it came from.

params/   params.sha256   config.json   text.json   tokenizer.json, ... (where the source has them)   iceformer.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from ..host.messages import listed, plain_errors, shown
from ..model.encoder import Encoder
from ..model.pooling import SentenceEmbedding
from ..model.registry import Model, ModelConfig, abstract_module, build
from .auxiliary_files import CONFIG
from .finite import all_finite
from .json_file import read_json
from .parameters import restore_params, stored_params
from .rules import dotted
from .text import TextSettings, read_text_settings

PARAMS = "params"
PROVENANCE = "iceformer.json"
FORMAT_VERSION = 2
_DTYPES = ("float32", "bfloat16", "float16")


def load_model(checkpoint: str | Path, dtype: DTypeLike = "float32") -> Model:
    """The NNX module of a checkpoint written by `convert_checkpoint`, on the CPU.

    A sentence embedder returns its embedding as `pooled`, and a cross-encoder its `scores`. What the files say about
    texts (prompts, lower case, length) and truncated embeddings is in `read_text_settings`; a session applies it.

    Args:
        checkpoint: the folder.
        dtype: of parameters and activations: float32, bfloat16 or float16, whatever the checkpoint holds.

    Raises:
        FileNotFoundError: the folder does not exist, or is not a checkpoint.
        ValueError: a checkpoint in another format, parameters that do not fit its config, or an unknown dtype.
    """
    with plain_errors():
        return _load(Path(checkpoint), dtype)


def _load(checkpoint: Path, dtype: DTypeLike) -> Model:
    if (name := jnp.dtype(dtype).name) not in _DTYPES:
        raise ValueError(f"dtype is {name}, expected one of: {', '.join(_DTYPES)}")
    _check(checkpoint)
    architecture, config = build(read_json(checkpoint / CONFIG))
    stored = stored_params(checkpoint / PARAMS)
    check_layers(config, len(stored), checkpoint)
    module = abstract_module(architecture, config, dtype)
    settings = read_text_settings(checkpoint)
    if isinstance(module, Encoder) and settings is not None:
        _add_text_parts(module, settings, dtype)
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, _restore(checkpoint / PARAMS, stored, nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def check_layers(config: ModelConfig, tensors: int, folder: Path) -> None:
    """ValueError if a config asks for layers that cannot be there: a layer takes a tensor at least."""
    if config.num_hidden_layers > tensors:
        raise ValueError(
            f"config: the number of layers is {config.num_hidden_layers}, but {shown(folder)} holds only {tensors} "
            "tensors in total: the config does not belong to these weights"
        )


def _add_text_parts(module: Encoder, settings: TextSettings, dtype: DTypeLike) -> None:
    """Gives an abstract encoder what its settings put behind its layers."""
    embedding = settings.embedding
    if embedding is not None:
        # It was None, which nnx keeps among what is no parameter.
        module.sentence_embedding = nnx.data(
            nnx.eval_shape(lambda: SentenceEmbedding(embedding, rngs=nnx.Rngs(0), param_dtype=dtype))
        )
    module.score_activation = settings.score_activation


def _check(checkpoint: Path) -> None:
    if not (checkpoint / PROVENANCE).is_file():
        raise FileNotFoundError(
            f"{shown(checkpoint)} is not an iceformer checkpoint ({PROVENANCE} is missing): make one with "
            "`iceformer convert`"
        )
    version = read_json(checkpoint / PROVENANCE).get("format")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{shown(checkpoint)} has format {version!r}, expected {FORMAT_VERSION}: convert the source again"
        )
    if not (checkpoint / PARAMS).is_dir():
        raise FileNotFoundError(f"{shown(checkpoint)} lacks {PARAMS}/: convert the source again")


def _restore(folder: Path, stored: Mapping[str, jax.ShapeDtypeStruct], tree: dict[str, Any]) -> dict[str, Any]:
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), tree)
    _check_fit(folder, stored, _by_name(wanted))
    params = restore_params(folder, wanted)
    _check_finite(folder, stored, _by_name(params))
    return params


def _check_fit(folder: Path, stored: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, Any]) -> None:
    found = {name: list(leaf.shape) for name, leaf in stored.items()}
    expected = {name: list(leaf.shape) for name, leaf in wanted.items()}
    differing = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    differing += [
        f"{name} is in {leaf.dtype}, expected {', '.join(_DTYPES)}"
        for name, leaf in sorted(stored.items())
        if leaf.dtype.name not in _DTYPES
    ]
    if differing:
        raise ValueError(f"{shown(folder)} does not fit the {CONFIG} next to it:{listed(differing)}")


def _check_finite(folder: Path, stored: Mapping[str, jax.ShapeDtypeStruct], params: Mapping[str, Any]) -> None:
    """ValueError that lists the parameters which a cast to a smaller range made infinite."""
    overflowed = [
        f"{name}: {stored[name].dtype} in the checkpoint, {array.dtype} requested"
        for name, array in sorted(params.items())
        if jnp.finfo(array.dtype).max < jnp.finfo(stored[name].dtype).max and not all_finite(np.asarray(array))
    ]
    if overflowed:
        raise ValueError(
            f"{shown(folder)} has values that are too large for the requested dtype: ask for float32 or for the "
            f"dtype of the checkpoint:{listed(overflowed)}"
        )


def _by_name(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: Any = flatten_dict(tree)
    return {dotted(path): leaf for path, leaf in flat.items()}
