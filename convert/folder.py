"""A folder that is there whole or not at all."""

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
    `.NAME.partial-PID-RANDOM`.

    Raises:
        FileExistsError: anything stands at `target`.
    """
    check_absent(target)
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
