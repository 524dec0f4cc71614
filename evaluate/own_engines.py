"""Our own engines of the benchmark: artifacts with two-stage, with exact, and with no attention (`floor`)."""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import model as architectures
from ..attention import Dense, TwoStage
from ..convert.convert import convert_checkpoint
from ..deploy.compile import compile as compile_checkpoint

OURS = ("two_stage", "exact", "floor")
_CHUNK = 2048


def compile_engine(
    engine: str, source: Path, checkpoint: Path, artifact: Path, *, length: int, attention: TwoStage, dtype: str
) -> None:
    """Writes the artifact of one of our engines, for prompts of `length` tokens.

    Args:
        engine: one of `OURS`.
        source: Hugging Face folder.
        checkpoint: its conversion, made if it is not there.
        artifact: the folder to write, which must not exist.
        length: in tokens; the bucket is that, rounded up to whole chunks.
        attention: of the engine `two_stage`.
        dtype: "float32" or "bfloat16".
    """
    if not checkpoint.exists():
        convert_checkpoint(source, checkpoint)
    chunk = min(_CHUNK, length)
    with attention_left_out() if engine == "floor" else ExitStack():
        compile_checkpoint(
            checkpoint,
            artifact,
            buckets=(-(-length // chunk) * chunk,),
            attention=attention if engine == "two_stage" else Dense(),
            dtype=dtype,
            chunk=chunk,
        )


@contextmanager
def attention_left_out() -> Iterator[None]:
    """Models traced inside have their values in place of attention, so that only the dense layers' work is left."""

    def values(config: Any, query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
        return jnp.repeat(value[:, :, : query.shape[2]], query.shape[1] // value.shape[1], axis=1)

    modules = [
        importlib.import_module(f"{architectures.__name__}.{module.name}")
        for module in pkgutil.iter_modules(architectures.__path__)
    ]
    replaced = {module: module.attend for module in modules if hasattr(module, "attend")}
    try:
        for module in replaced:
            module.attend = values  # type: ignore[attr-defined]
        yield
    finally:
        for module, attend in replaced.items():
            module.attend = attend  # type: ignore[attr-defined]
