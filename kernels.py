"""The native kernels that compiled code may call: whether they are built here, and making them known to XLA.

A leaf module that a process which only runs artifacts imports too: jax and ctypes, nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

TARGETS = frozenset({"iceformer_two_stage", "iceformer_exact"})
"""Names of the custom calls."""


def version() -> str | None:
    """The version of the kernel library; None if it is not built."""
    return None


def register() -> bool:
    """Registers the custom calls with XLA, once; False if the library is not built."""
    return False


@contextmanager
def disabled() -> Iterator[None]:
    """Functions that are traced inside have the pure XLA form."""
    yield
