"""Writing files and folders: errors name the path, targets are refused before the work, and what is written is there
whole or not at all."""

import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .interrupts import check as check_interrupt
from .interrupts import interruptible
from .messages import shown

# Beside it, the name of a temporary folder has up to 30 bytes, of the 255 that there are.
_LONGEST = 200


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError from inside, such as that of a full disk, the path if it has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_parent(target: Path) -> None:
    """Raises NotADirectoryError or another OSError, with the path, if nothing can be made at `target`.

    What stands there already is no matter; folders above it may be missing.
    """
    above = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(above))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well and is removed otherwise.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    if path.exists() and not path.is_file():  # a device or a pipe
        with naming(path), path.open("wb") as file:
            yield file
        return
    partial = _partial(path)
    try:
        with naming(path), partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_absent(target: Path) -> None:
    """Raises unless a folder can be made at `target`.

    Raises:
        FileExistsError: anything stands there.
        OSError: a parent is a file or must not be written, or the name is too long.
    """
    try:
        os.lstat(target)
    except FileNotFoundError:
        check_parent(target)
    else:
        raise FileExistsError(f"{shown(target)} exists: remove it first or give another path")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which takes its name when the block ends well and is removed otherwise.

    Parents of `target` are made, and removed again if the block fails. A killed process leaves at most
    `.NAME.partial-PID-RANDOM`, which the next one that writes the same target removes.

    Raises:
        FileExistsError: anything stands at `target`.
        OSError: it cannot be made there.
    """
    check_absent(target)
    _sweep(target)
    made = [parent for parent in target.parents if not parent.exists()]
    partial = _partial(target)
    try:
        with interruptible():
            partial.mkdir(parents=True)
            yield partial
            check_interrupt()
            check_absent(target)
            partial.rename(target)
    except BaseException as error:
        if isinstance(error, OSError) and str(error.filename).startswith(str(partial)):
            error.filename = str(target)
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _partial(target: Path) -> Path:
    """What is written until it takes the place of the target."""
    return target.parent / f"{_partial_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}"


def _partial_prefix(target: Path) -> str:
    """What the names of temporary files and folders for a target begin with, short enough for any file system."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.partial-"


def _sweep(target: Path) -> None:
    """Removes what processes that were killed left of earlier attempts."""
    for partial in target.parent.glob(f"{glob.escape(_partial_prefix(target))}*-*"):
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
