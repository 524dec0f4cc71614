"""An artifact's machine code, weights and caches, ready to be called: what is below the engine."""

import ctypes
import gc
import time
import warnings
import weakref
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from .. import kernels
from .artifact import Artifact, Tier
from .cache_copy import Layers
from .executables import Executable, MachineCodeError, PortableEntry, PortableTierWarning, load_native
from .manifest import ArrayInfo, BucketInfo, Manifest
from .weights import cpu_device, memory_map, put_weights, read_weights

_UNMAP_SECONDS = 5.0

Cache = tuple[dict[str, jax.Array], ...]


class Runner:
    """Calls the entries of an artifact. Its caches are made when a bucket is used first.

    Attributes:
        info: the manifest.
        tier: "native" if the artifact's machine code runs, "portable" if its StableHLO is compiled here on first use.

    Raises:
        ArtifactError: as `iceformer.load`.

    Warns:
        PortableTierWarning: as `iceformer.load`.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.info: Manifest = artifact.manifest
        self.tier: Tier
        weights = self.info.weights
        views = read_weights(artifact.path / weights.file.path, weights.tensors)
        self._weight_map = weakref.ref(memory_map(views))
        arrays = put_weights(views)
        self._weights = tuple(arrays[name] for name in weights.tensors)
        self._entries, self.tier = _load_entries(artifact)
        self._caches: dict[int, Cache] = {}

    def call(self, bucket: BucketInfo, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Runs an entry on the bucket's cache and gives its results without the cache.

        The cache is donated: it leaves before the call, so that a call that fails or is interrupted cannot leave a dead
        one behind. After such a call the bucket's cache is empty.
        """
        cache = self._caches.pop(bucket.capacity, None) or _empty_cache(bucket)
        cache, *results = self._entries[bucket.capacity, name](self._weights, cache, *arguments)
        self._caches[bucket.capacity] = cache
        return tuple(results)

    def cache_views(self, bucket: BucketInfo) -> Layers:
        """The bucket's cache as arrays on the host that share its memory and may be written to.

        Valid until the next call. Nobody else holds the cache, because every call donates it, so that writing to it
        between two calls changes nothing that jax takes for constant.
        """
        if bucket.capacity not in self._caches:
            self._caches[bucket.capacity] = _empty_cache(bucket)
        cache = jax.block_until_ready(self._caches[bucket.capacity])
        return tuple({name: _writable(array) for name, array in layer.items()} for layer in cache)

    def close(self) -> None:
        """Gives back the memory of weights, caches and machine code."""
        for array in jax.tree.leaves((self._weights, self._caches)):
            array.delete()
        self._weights = ()
        self._caches.clear()
        self._entries.clear()
        # jax lets go of the weights' file when Python collects garbage, and XLA's threads hold on to what a call took
        # for a moment after the call's results are there.
        end = time.monotonic() + _UNMAP_SECONDS
        while self._weight_map() is not None and time.monotonic() < end:
            gc.collect(0)
            time.sleep(0.001)


def _load_entries(artifact: Artifact) -> tuple[dict[tuple[int, str], Executable], Tier]:
    """Callables by capacity and entry, and the tier they are of."""
    info = artifact.manifest
    every = [(bucket, name, entry) for bucket in info.buckets for name, entry in bucket.entries.items()]
    differences = list(artifact.differences)
    if info.environment.kernels and not differences and not kernels.register():
        differences.append("calls native kernels that this process cannot register")
    if not differences:
        try:
            native = {(bucket.capacity, name): load_native(artifact, bucket, entry) for bucket, name, entry in every}
        except MachineCodeError as error:
            differences.append(str(error))
        else:
            return native, "native"
    portable: dict[tuple[int, str], Executable] = {
        (bucket.capacity, name): PortableEntry(artifact, bucket, entry) for bucket, name, entry in every
    }
    seconds = sum(entry.compile_seconds for _, _, entry in every)
    warnings.warn(
        f"the machine code in {artifact.path} cannot run here ({'; '.join(differences)}): its StableHLO is "
        f"compiled instead, each entry on first use (about {seconds:.0f} s for all of them); "
        "compile the artifact again on this machine to avoid it",
        PortableTierWarning,
        stacklevel=5,
    )
    return portable, "portable"


def _writable(array: jax.Array) -> NDArray[Any]:
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
    return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)


def _empty_cache(bucket: BucketInfo) -> Cache:
    device = cpu_device()

    def put(array: ArrayInfo) -> jax.Array:
        zeros = np.zeros(array.shape, jax.numpy.dtype(array.dtype))
        return jax.device_put(zeros, device, may_alias=False)

    return tuple({name: put(array) for name, array in layer.items()} for layer in bucket.cache.layers)
