"""A folder that is there whole or not at all."""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_absent(target: Path) -> None:
    """FileExistsError if anything stands at `target`."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: remove it first or give another path")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes its name when the block ends well and is removed otherwise.

    Parents of `target` are made, and removed again if the block fails. A killed process leaves at most
    `.NAME.partial-PID-RANDOM`, which the next one that writes the same target removes.

    Raises:
        FileExistsError: anything stands at `target`.
    """
    check_absent(target)
    _sweep(target)
    made = [parent for parent in target.parents if not parent.exists()]
    partial = target.parent / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        check_absent(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _sweep(target: Path) -> None:
    """Removes what processes that were killed left of earlier attempts."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-*-*"):
        pid = partial.name.rsplit("-", 2)[1]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether a process of that number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
