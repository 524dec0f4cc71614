"""Writing files: errors name the path, targets are refused before the work, files are there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
