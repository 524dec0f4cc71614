"""The native kernels: a shared library of XLA custom calls for attention, found, registered, chosen.

The library is built when the package is installed (setup.py) from kernels/native. Where it is missing, or switched
off with ICEFORMER_KERNELS=0, attention runs in pure XLA, which computes the same. ICEFORMER_KERNELS may also be the
path of another build of the library. ICEFORMER_ISA names the instruction set that the library uses, among those that
the processor has; by default it takes the best.

Imports only jax, so that a session can register the kernels before it loads machine code that calls them.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import jax

EXACT, TWO_STAGE, LINEAR = "iceformer_exact", "iceformer_two_stage", "iceformer_linear"
CHOOSE, ATTEND_CHOSEN = "iceformer_choose", "iceformer_attend_chosen"
IN_A_KERNEL = "in a kernel"
"""The end of the words for a call of attention that a native kernel computes."""
TARGETS = frozenset({EXACT, TWO_STAGE, LINEAR, CHOOSE, ATTEND_CHOSEN})
"""Names of the custom calls."""

_STRINGS = ("iceformer_version", "iceformer_instruction_set", "iceformer_instruction_sets")
_CHOOSE_INSTRUCTION_SET = "iceformer_choose_instruction_set"
_WITH_BFLOAT16 = ("avx512_bf16", "amx")
_LIBRARY = Path(__file__).parent / "native" / "libiceformer.so"
_allowed: ContextVar[bool] = ContextVar("iceformer_kernels", default=True)


class KernelsMissingWarning(UserWarning):
    """The native kernels are not built, so that attention runs in pure XLA."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library with its custom calls registered, or None where there is none."""
    wanted = os.environ.get("ICEFORMER_KERNELS") or "1"
    if wanted == "0":
        return None
    file = _LIBRARY if wanted == "1" else Path(wanted)
    if file != _LIBRARY and not file.is_file():
        raise FileNotFoundError(
            f"ICEFORMER_KERNELS is {wanted!r}, but there is no such file: expected the path of a build of the library, "
            "or 0 for pure XLA, or 1"
        )
    try:
        library = ctypes.CDLL(str(file.resolve()))
    except OSError as error:
        missing = "iceformer was installed without its native kernels (no C++ compiler?)"
        reason = f"iceformer's native kernels cannot be loaded ({error})" if file.exists() else missing
        warnings.warn(
            f"{reason}: attention runs in pure XLA, which is slower; install a C++ compiler and then iceformer again",
            KernelsMissingWarning,
            stacklevel=4,
        )
        return None
    missing = [name for name in (*_STRINGS, _CHOOSE_INSTRUCTION_SET, *sorted(TARGETS)) if not hasattr(library, name)]
    if missing:
        raise ValueError(
            f"ICEFORMER_KERNELS is {wanted!r}, which is not a build of these kernels (it lacks {', '.join(missing)}): "
            "expected the path of one, or 0 for pure XLA, or 1"
        )
    for name in _STRINGS:
        getattr(library, name).restype = ctypes.c_char_p
    library.iceformer_choose_instruction_set.restype = ctypes.c_bool
    name = os.environ.get("ICEFORMER_ISA", "")
    if not library.iceformer_choose_instruction_set(name.encode()):
        known = library.iceformer_instruction_sets().decode().replace(" ", ", ")
        raise ValueError(f"ICEFORMER_ISA is {name!r}, but this build and this processor have: {known}")
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return library


def register() -> bool:
    """Makes the custom calls known to XLA, once; False where the library is not there or switched off.

    Raises:
        FileNotFoundError: ICEFORMER_KERNELS names a library that is not there.
        ValueError: it names a library that is not a build of the kernels, or ICEFORMER_ISA names an instruction set
            that this processor or this build lacks.
    """
    return _library() is not None


def version() -> str | None:
    """The library's version, which changes with its sources; None where it is not there or switched off."""
    library = _library()
    return library.iceformer_version().decode() if library else None


def instruction_set() -> str | None:
    """The instruction set that the kernels use here, e.g. "avx2"; None without the library."""
    library = _library()
    return library.iceformer_instruction_set().decode() if library else None


def multiplies_bfloat16() -> bool:
    """Whether the instruction set has products of bfloat16, which XLA uses, too."""
    return instruction_set() in _WITH_BFLOAT16


def instruction_sets() -> tuple[str, ...]:
    """Those that the kernels have for this processor, best first."""
    library = _library()
    return tuple(library.iceformer_instruction_sets().decode().split()) if library else ()


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Inside, the kernels use the given one of `instruction_sets()`, in every thread."""
    library = _library()
    if library is None or instruction_set not in instruction_sets():
        raise ValueError(f"instruction set is {instruction_set!r}, expected one of: {', '.join(instruction_sets())}")
    before = library.iceformer_instruction_set()
    library.iceformer_choose_instruction_set(instruction_set.encode())
    try:
        yield
    finally:
        library.iceformer_choose_instruction_set(before)


def enabled() -> bool:
    """Whether attention that is traced now calls the kernels."""
    return _allowed.get() and register()


@contextmanager
def disabled() -> Iterator[None]:
    """Attention that is traced inside is pure XLA. What was traced before stays in jit's caches as it is."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)
