"""Lowers and compiles the entries of one bucket, and writes their machine code and StableHLO into the artifact."""

import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from .. import kernels
from ..attention import listening, plan_to_dict
from .artifact import write_file
from .crossover import Choice
from .entries import Entries, Entry
from .manifest import ArrayInfo, BucketInfo, CacheInfo, EntryInfo, MemoryInfo

# Custom calls that XLA's CPU runtime carries itself. Others (LAPACK) crash a process that did not register them.
KNOWN_CUSTOM_CALLS = frozenset({"TopK", "__onednn$matmul", "__onednn$softmax", "__onednn$layernorm"})
# What may be stored: the session registers our own kernels before it loads code that calls them.
STORABLE_CUSTOM_CALLS = KNOWN_CUSTOM_CALLS | kernels.TARGETS


def compile_bucket(
    folder: Path,
    entries: Entries,
    *,
    capacity: int,
    chunk: int,
    batch: int,
    page: int,
    choice: Choice,
    kv_dtype: str,
    report: Callable[[str], None],
) -> BucketInfo:
    """Compiles the entries for one capacity and writes them under `folder`.

    Args:
        folder: the artifact that is being written.
        entries: the model.
        capacity: longest row, in tokens.
        chunk: tokens of a row that one call takes.
        batch: rows of an encoder's call, or slots of a decoder's cache.
        page: tokens of the cache's pages; 0 where a slot is one page.
        choice: the plan, why it is that one, and the evidence for it.
        kv_dtype: of keys and values in the cache.
        report: called with a line of text before each entry; XLA compiles those before it meanwhile.

    Raises:
        ValueError: the code calls something that a process which loads it may not have.
    """
    entries = dataclasses.replace(entries, plan=choice.plan)
    cache = entries.cache(capacity, batch, kv_dtype, page)
    lowered: dict[str, _Lowered] = {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with _without_compilation_cache():
            for name, entry in entries.functions(capacity, chunk, batch, page).items():
                report(f"compiling {name} for {capacity} tokens")
                lowered[name] = _lower(entry, entries, cache, pool)
            infos = {name: _write_entry(folder, f"{capacity}/{name}", entry) for name, entry in lowered.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    return BucketInfo(capacity, chunk, plan_to_dict(choice.plan), choice.reason, choice.evidence, cache, infos)


class _Lowered(NamedTuple):
    """An entry that XLA compiles on another thread, and what else is stored of it."""

    entry: Entry
    lowered: jax.stages.Lowered
    compiled: Future[tuple[jax.stages.Compiled, float]]
    """With the seconds that it took."""
    portable: bytes
    attention: dict[str, int]


def _lower(entry: Entry, entries: Entries, cache: CacheInfo, pool: ThreadPoolExecutor) -> _Lowered:
    weights = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in entries.weights)
    spec_of_cache = tuple({name: _spec(array) for name, array in layer.items()} for layer in cache.layers)
    specs = (weights, spec_of_cache, *(_spec(array) for array in entry.arguments.values()))
    with listening() as calls:
        lowered = jax.jit(entry.function, donate_argnums=1).lower(*specs)
    compiled = pool.submit(_compile, lowered)
    return _Lowered(entry, lowered, compiled, portable_code(entry.function, specs), dict(calls))


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def _write_entry(folder: Path, name: str, made: _Lowered) -> EntryInfo:
    compiled, seconds = made.compiled.result()
    custom_calls = tuple(sorted(set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text() or ""))))
    check_custom_calls(name, custom_calls)
    payload, _, _ = serialize_executable.serialize(compiled)
    _, *results = made.lowered.out_info
    return EntryInfo(
        native=write_file(folder, f"native/{name}.bin", payload),
        portable=write_file(folder, f"portable/{name}.stablehlo", made.portable),
        arguments=made.entry.arguments,
        results={key: _info(array) for key, array in zip(made.entry.results, results, strict=True)},
        stablehlo_sha256=hashlib.sha256(made.lowered.as_text().encode()).hexdigest(),
        custom_calls=custom_calls,
        attention=made.attention,
        memory=_memory(compiled),
        compile_seconds=round(seconds, 3),
    )


@contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Inside, jax compiles anew: what comes out of its cache on disk lacks functions when it is serialised again."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # Whether the cache is used is remembered until then.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def portable_code(function: Callable[..., Any], specs: tuple[Any, ...]) -> bytes:
    """The serialized StableHLO of a function, in the form that calls no native kernels."""

    # jit keeps traces by function: the same one again would give the trace that calls the kernels.
    def traced_again(*arguments: Any) -> Any:
        return function(*arguments)

    with kernels.disabled():
        exported = export.export(jax.jit(traced_again, donate_argnums=1), platforms=("cpu",))(*specs)
    return bytes(exported.serialize())


def check_custom_calls(entry: str, targets: tuple[str, ...]) -> None:
    """Raises ValueError for a custom call that a process which loads the code may not have."""
    unknown = sorted(set(targets) - STORABLE_CUSTOM_CALLS)
    if unknown:
        raise ValueError(
            f"{entry} calls {', '.join(unknown)}, which another process may not have: only "
            f"{', '.join(sorted(STORABLE_CUSTOM_CALLS))} can be stored; use another method of attention"
        )


def _memory(compiled: jax.stages.Compiled) -> MemoryInfo:
    stats = compiled.memory_analysis()
    assert stats is not None
    return MemoryInfo(stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes)


def _spec(array: ArrayInfo) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))


def _info(array: Any) -> ArrayInfo:
    return ArrayInfo(tuple(array.shape), str(np.dtype(array.dtype)))
