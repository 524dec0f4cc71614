"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor, in a callback of C++ code or under a broad
`except` that exception is dropped, and the work goes on as if nothing had been asked. Here it is noted as well, and
raised again at the next step.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_SECONDS = 1.0
"""A signal that follows another sooner is the same wish: one more exception would only cut the cleaning up short."""


class _Wish:
    """Whether Ctrl-C was pressed in a block that watches for it, and when."""

    def __init__(self) -> None:
        self.watching = False
        self.raised_at: float | None = None

    def note(self, signal_number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = self.raised_at is not None and now - self.raised_at < _REPEAT_SECONDS
        self.raised_at = now
        if not repeated:
            raise KeyboardInterrupt


_wish = _Wish()


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed since the outermost `interruptible` block began."""
    if _wish.raised_at is not None and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt as ever, and where that gets lost, `check` and the block's end raise it.

    Does nothing outside of the main thread, where somebody else handles SIGINT, and inside another such block.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and not _wish.watching
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return
    _wish.raised_at = None
    _wish.watching = True
    try:
        signal.signal(signal.SIGINT, _wish.note)
        yield
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _wish.watching = False
        _wish.raised_at = None
