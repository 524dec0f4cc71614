"""Compiled entries of an artifact as callables: machine code where it fits, StableHLO compiled on first use elsewhere.

Argument trees are rebuilt from the manifest (plain tuples), never from a pickled tree.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import export
from jax.experimental import serialize_executable

from .artifact import Artifact
from .manifest import ArtifactError, BucketInfo, EntryInfo

Executable = Callable[..., tuple[Any, ...]]


class MachineCodeError(RuntimeError):
    """Machine code that XLA does not take, whatever the manifest says."""


class PortableTierWarning(UserWarning):
    """The artifact's machine code does not fit this host, so that its StableHLO is compiled here instead."""


def load_native(artifact: Artifact, bucket: BucketInfo, entry: EntryInfo) -> Executable:
    """An entry's machine code, ready to call; nothing is traced or compiled.

    Raises:
        MachineCodeError: XLA refuses the code although versions and CPU features fit.
    """
    device = jax.devices("cpu")[0]
    arguments = (artifact.manifest.weights.names, bucket.cache.layers, *entry.arguments.values())
    results = (bucket.cache.layers, *entry.results.values())
    try:
        return serialize_executable.deserialize_and_load(
            artifact.read(entry.native),
            jax.tree.structure((_leaves(arguments), {})),
            jax.tree.structure(_leaves(results)),
            backend=device.client,
            execution_devices=[device],
        )
    except Exception as error:
        # The bytes are those that were compiled, so whatever XLA or unpickling says, the portable tier may still do.
        raise MachineCodeError(f"XLA cannot load {entry.native.path}: {error}") from error


class PortableEntry:
    """An entry's StableHLO, compiled when it is first called."""

    def __init__(self, artifact: Artifact, entry: EntryInfo) -> None:
        self._artifact = artifact
        self._file = entry.portable
        self._compiled: Executable | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        if self._compiled is None:
            self._compiled = self._compile(arguments)
        return self._compiled(*arguments)

    def _compile(self, arguments: tuple[Any, ...]) -> Executable:
        data = bytearray(self._artifact.read(self._file))
        try:
            return jax.jit(export.deserialize(data).call, donate_argnums=1).lower(*arguments).compile()
        except Exception as error:
            raise ArtifactError(
                f"jax {jax.__version__} cannot compile {self._file.path} ({error}): compile the artifact again here"
            ) from error


def _leaves(tree: Any) -> Any:
    """The same nesting of tuples with 0 for every leaf (a manifest's records and names are leaves)."""
    return tuple(_leaves(item) for item in tree) if isinstance(tree, tuple) else 0
