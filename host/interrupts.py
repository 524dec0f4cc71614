"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor or a callback of the garbage collector (jax
has one) it is printed and dropped, and under a broad `except` it is dropped without a word: the work goes on as if
nothing had been asked. In the middle of an import it can leave a C++ library half made, which crashes. So here it waits
for imports, is raised again where it was dropped, and is noted for the next step to raise.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_REPEAT_SECONDS = 1.0
"""A signal that follows another sooner is the same wish: one more exception would only cut the cleaning up short."""
_AGAIN_SECONDS = 0.02
_IMPORTING = "<frozen importlib._bootstrap>"


class _Wish:
    """Whether Ctrl-C was pressed in a block that watches for it, and when that was raised."""

    def __init__(self) -> None:
        self.watching = False
        self.pressed = False
        self.raised_at = -_REPEAT_SECONDS

    def note(self, signal_number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        self.pressed = True
        if _is_importing(frame):
            self.raise_soon()
        elif time.monotonic() - self.raised_at >= _REPEAT_SECONDS:
            self.raised_at = time.monotonic()
            raise KeyboardInterrupt

    def raise_soon(self) -> None:
        """Sends the signal again, to be handled somewhere else."""
        self.raised_at = -_REPEAT_SECONDS
        timer = threading.Timer(_AGAIN_SECONDS, self._send)
        timer.daemon = True
        timer.start()

    def _send(self) -> None:
        if self.watching:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


_wish = _Wish()


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed since the outermost `interruptible` block began."""
    if _wish.pressed and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def settle() -> None:
    """Forgets that Ctrl-C was pressed, after what it was meant for has ended."""
    _wish.pressed = False


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
    unraisable = sys.unraisablehook

    def report(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            _wish.raise_soon()
        else:
            unraisable(dropped)

    _wish.pressed, _wish.raised_at, _wish.watching = False, -_REPEAT_SECONDS, True
    try:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, _wish.note)
        yield
        check()
    finally:
        _wish.pressed = _wish.watching = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = unraisable


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
