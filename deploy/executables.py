"""Compiled entries of an artifact as callables: machine code where it fits, StableHLO compiled on first use elsewhere.

Argument trees are rebuilt from the manifest (plain tuples and dicts), never from a pickled tree.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental import serialize_executable

from .artifact import MANIFEST, Artifact
from .manifest import ArrayInfo, ArtifactError, BucketInfo, EntryInfo, FileInfo
from .weights import cpu_device

Executable = Callable[..., tuple[Any, ...]]


class MachineCodeError(RuntimeError):
    """Machine code that XLA does not take, whatever the manifest says."""


class PortableTierWarning(UserWarning):
    """The artifact's machine code does not fit this host, so that its StableHLO is compiled here instead."""


def load_native(artifact: Artifact, bucket: BucketInfo, entry: EntryInfo) -> Executable:
    """An entry's machine code, ready to call; nothing is traced or compiled.

    Raises:
        ArtifactError: it takes or gives other arrays than the manifest says.
        MachineCodeError: XLA refuses the code although versions and CPU features fit.
    """
    device = cpu_device()
    arguments, results = _signature(artifact, bucket, entry)
    try:
        compiled = serialize_executable.deserialize_and_load(
            artifact.read(entry.native),
            jax.tree.structure((_leaves(arguments), {})),
            jax.tree.structure(_leaves(results)),
            backend=device.client,
            execution_devices=[device],
        )
        found = jax.tree.leaves(compiled.in_avals), jax.tree.leaves(compiled.out_info)
    except ArtifactError:
        raise  # of a file that changed meanwhile
    except Exception as error:
        # The bytes are those that were compiled, so whatever XLA or unpickling says, the portable tier may still do.
        raise MachineCodeError(f"XLA cannot load {entry.native.path}: {error}") from error
    _check_signature(entry.native, found, (arguments, results))
    return compiled


class PortableEntry:
    """An entry's StableHLO, compiled when it is first called.

    Raises:
        ArtifactError: jax cannot read it, or it takes or gives other arrays than the manifest says.
    """

    def __init__(self, artifact: Artifact, bucket: BucketInfo, entry: EntryInfo) -> None:
        self._artifact = artifact
        self._file = entry.portable
        self._compiled: Executable | None = None
        exported = self._read()
        _check_signature(self._file, (exported.in_avals, exported.out_avals), _signature(artifact, bucket, entry))

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        if self._compiled is None:
            self._compiled = self._compile(arguments)
        return self._compiled(*arguments)

    def _read(self) -> export.Exported:
        data = bytearray(self._artifact.read(self._file))
        try:
            return export.deserialize(data)
        except Exception as error:
            raise ArtifactError(self._cannot("read", error)) from error

    def _compile(self, arguments: tuple[Any, ...]) -> Executable:
        exported = self._read()
        try:
            return jax.jit(exported.call, donate_argnums=1).lower(*arguments).compile()
        except Exception as error:
            raise ArtifactError(self._cannot("compile", error)) from error

    def _cannot(self, do: str, error: Exception) -> str:
        return f"jax {jax.__version__} cannot {do} {self._file.path} ({error}): compile the artifact again here"


Signature = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Nested arguments and results, records of arrays at the leaves."""


def _signature(artifact: Artifact, bucket: BucketInfo, entry: EntryInfo) -> Signature:
    """What the manifest says that an entry takes and gives."""
    weights, cache = tuple(artifact.manifest.weights.tensors.values()), bucket.cache.layers
    return (weights, cache, *entry.arguments.values()), (cache, *entry.results.values())


def _check_signature(file: FileInfo, found: tuple[Sequence[Any], Sequence[Any]], expected: Signature) -> None:
    for what, code, manifest in zip(("takes", "gives"), found, expected, strict=True):
        described = [ArrayInfo(tuple(array.shape), str(np.dtype(array.dtype))) for array in code]
        named = jax.tree.leaves(manifest)
        if described == named:
            continue
        if len(described) != len(named):
            difference = f"{len(described)} arrays, where {MANIFEST} says {len(named)}"
        else:
            difference = next(
                f"{ours} as array {index}, where {MANIFEST} says {theirs}"
                for index, (ours, theirs) in enumerate(zip(described, named, strict=True))
                if ours != theirs
            )
        raise ArtifactError(f"{file.path} {what} {difference}: copy the artifact again or compile it again")


def _leaves(tree: Any) -> Any:
    """The same nesting of tuples and dicts with 0 for every leaf (a manifest's records are leaves)."""
    if isinstance(tree, dict):
        return {name: _leaves(item) for name, item in tree.items()}
    return tuple(_leaves(item) for item in tree) if isinstance(tree, tuple) else 0
