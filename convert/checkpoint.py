"""The checkpoint: a folder with Orbax parameters, the config and tokenizer files of its source, and where it came from.

params/   config.json   tokenizer.json, ... (where the source has them)   iceformer.json
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from ..model.encoder import Encoder
from ..model.pooling import MODULES, Pooling, read_pooling
from ..model.registry import Model, abstract_module, build
from .companions import CONFIG
from .problems import listed
from .reader import parse_json, read_json
from .rules import dotted

PARAMS = "params"
PROVENANCE = "iceformer.json"
FORMAT_VERSION = 1
_DTYPES = ("float32", "bfloat16", "float16")
_FILE_BYTES = 2**26


def load_model(checkpoint: str | Path, dtype: DTypeLike = "float32") -> Model:
    """The NNX module of a checkpoint that `convert_checkpoint` wrote, on the CPU.

    An encoder whose checkpoint has the files of sentence-transformers pools as they say.

    Args:
        checkpoint: the folder.
        dtype: dtype of parameters and activations, float32, bfloat16 or float16, whatever the checkpoint holds.

    Raises:
        FileNotFoundError: no such folder, or not a checkpoint.
        ValueError: a checkpoint of another format, parameters that do not fit its config, an unknown dtype, or a
            sentence embedder with modules that are not supported.
    """
    checkpoint = Path(checkpoint)
    if (name := jnp.dtype(dtype).name) not in _DTYPES:
        raise ValueError(f"dtype is {name}, expected one of: {', '.join(_DTYPES)}")
    _check(checkpoint)
    module = abstract_module(*build(read_json(checkpoint / CONFIG)), dtype)
    if isinstance(module, Encoder):
        module.pooling = pooling_of(checkpoint)
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, _restore(checkpoint / PARAMS, nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def pooling_of(folder: Path) -> Pooling | None:
    """The pooling of a folder that sentence-transformers saved, None for another.

    Raises:
        FileNotFoundError: it lacks a config that its modules.json names.
        ValueError: a module or an option that is not supported.
    """
    if not (folder / MODULES).exists():
        return None
    return read_pooling(parse_json(folder / MODULES), lambda module: read_json(folder / module / CONFIG))


def save_params(folder: Path, params: dict[str, Any]) -> None:
    """Writes a tree of jax arrays with Orbax to a folder that does not exist yet."""
    # Small files and a small window keep what Orbax holds beside the parameters to some hundred megabytes.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=_FILE_BYTES))


def _check(checkpoint: Path) -> None:
    if not (checkpoint / PROVENANCE).is_file():
        raise FileNotFoundError(
            f"{checkpoint} is not an iceformer checkpoint ({PROVENANCE} is missing): make one with `iceformer convert`"
        )
    version = read_json(checkpoint / PROVENANCE).get("format")
    if version != FORMAT_VERSION:
        raise ValueError(f"{checkpoint} has format {version!r}, expected {FORMAT_VERSION}: convert the source again")
    if not (checkpoint / PARAMS).is_dir():
        raise FileNotFoundError(f"{checkpoint} lacks {PARAMS}/: convert the source again")


def _restore(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), tree)
    expected = _shapes(wanted)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata: Any = checkpointer.metadata(folder.absolute())
            stored = _shapes(metadata.item_metadata.tree)
            if stored == expected:
                return checkpointer.restore(folder.absolute(), wanted)
    except Exception as error:
        # Orbax and TensorStore raise errors of many kinds for files that are missing or damaged.
        raise ValueError(f"{folder} cannot be read ({_first_line(error)}): convert the source again") from error
    differing = [
        f"{name} is {stored.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
    raise ValueError(f"{folder} does not fit {CONFIG} beside it:{listed(differing)}")


def _shapes(tree: Any) -> dict[str, list[int]]:
    flat: Any = flatten_dict(tree)
    return {dotted(path): list(leaf.shape) for path, leaf in flat.items()}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
