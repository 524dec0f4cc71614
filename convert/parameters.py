"""Parameters on disk: a tree of arrays to a folder in Orbax's format and back.

Orbax runs in a thread of its own, so that it works inside of a running event loop, as in notebooks, and so that Ctrl-C
does not reach into it.
"""

import asyncio
import errno
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from ..host.messages import shown

_FILE_BYTES = 2**26
_DESCRIPTORS = Path("/proc/self/fd")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_THREAD = "iceformer-orbax"
# What keeps Orbax quiet is set for the whole process.
_ONE_AT_A_TIME = threading.Lock()
_Result = TypeVar("_Result")


def save_params(folder: Path, params: dict[str, Any]) -> None:
    """Writes a tree of jax arrays to a folder that does not exist yet, whose parent does, and has any name.

    Beside it goes a file of checksums, as `sha256sum` writes and checks them: Orbax has none of the numbers.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """

    def save(path: Path) -> None:
        # Small files and a small window keep what Orbax holds beside the parameters to some hundred megabytes.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=_FILE_BYTES))

    try:
        _run(save, folder, writes=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{sha256_of(file)}  {file.relative_to(folder.parent).as_posix()}\n" for file in files]
        _sums_of(folder).write_text("".join(lines))
    except (ValueError, OSError) as error:
        if (number := _error_number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def stored_params(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """What a folder of `save_params` says of its arrays by dotted name, before any is read.

    Raises:
        PermissionError: a file must not be read.
        ValueError: a file is missing or damaged.
    """

    def read(path: Path) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.metadata(path)

    for path in (folder, *folder.rglob("*")):
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    _check_sums(folder)
    metadata = _read(read, folder)
    tree = getattr(getattr(metadata, "item_metadata", None), "tree", None)
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(f"{shown(folder)} cannot be read (it names no arrays): convert the source again")
    stored = {}
    for path, leaf in flatten_dict(dict(tree)).items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            raise ValueError(f"{shown(folder)} cannot be read ({shown(path)} is no array): convert the source again")
        stored[".".join(map(str, path))] = jax.ShapeDtypeStruct(shape, dtype)
    return stored


def sha256_of(file: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def restore_params(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a folder, cast to the dtypes of a tree of `jax.ShapeDtypeStruct` that has their shapes.

    Raises:
        PermissionError, ValueError: as `stored_params`.
    """

    def restore(path: Path) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, wanted)

    return _read(restore, folder)


def _read(work: Callable[[Path], _Result], folder: Path) -> _Result:
    try:
        return _run(work, folder)
    except Exception as error:
        # Orbax and TensorStore raise errors of many kinds for files that are missing or damaged.
        if _error_number(error) in (errno.EACCES, errno.EPERM):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{shown(folder)} cannot be read ({shown(reason)}): convert the source again") from error


def _sums_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256")


def _check_sums(folder: Path) -> None:
    """ValueError if a file is not as it was written. A checkpoint may go without the checksums."""
    if not _sums_of(folder).exists():
        return
    for line in _sums_of(folder).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder.parent / name
        if Path(name).parts[:1] != (folder.name,) or ".." in Path(name).parts:
            raise ValueError(f"{shown(_sums_of(folder))} is damaged ({name!r}): convert the source again")
        if not file.is_file():
            raise ValueError(f"{shown(folder)} cannot be read ({name} is missing): convert the source again")
        if sha256_of(file) != digest:
            raise ValueError(
                f"{shown(folder)} cannot be read ({name} was changed or damaged): convert the source again"
            )


def _run(work: Callable[[Path], _Result], folder: Path, *, writes: bool = False) -> _Result:
    """What `work` gives for a path to `folder`; once it fails or is interrupted, nothing is written there any more."""
    with (
        _ONE_AT_A_TIME,
        _plain_path(folder, writes) as (path, cut_off),
        _quiet_orbax(),
        ThreadPoolExecutor(1, thread_name_prefix=_THREAD) as pool,
    ):
        try:
            return pool.submit(work, path).result()
        except BaseException:
            cut_off()
            raise


@contextmanager
def _plain_path(folder: Path, writes: bool) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A path to `folder` without the names of its parents, and a function after which it leads nowhere.

    TensorStore takes some characters of a path, such as brackets, for a pattern. Writes that are still under way when
    another has failed would make the folder again after it was removed, if the path still led there.
    """
    if not _DESCRIPTORS.is_dir():
        yield folder.absolute(), lambda: None
        return
    descriptor = os.open(folder.parent, os.O_PATH | os.O_DIRECTORY)

    def cut_off() -> None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)

    try:
        yield _DESCRIPTORS / str(descriptor) / folder.name, cut_off
    except BaseException:
        # After a failed write the number stays taken: a late one must not find another folder under it.
        if not writes:
            os.close(descriptor)
        raise
    os.close(descriptor)


class _Loop(asyncio.SelectorEventLoop):
    """A loop that may be closed, as Orbax does at the first error, while TensorStore is still at work for it."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)  # Never run: nobody waits for it.


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's tracebacks from stderr: what they say is in the error that it raises."""
    others, logger = asyncio.get_event_loop_policy(), logging.getLogger("absl")

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return _Loop() if _is_orbax(threading.current_thread()) else others.new_event_loop()

    def is_foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    asyncio.set_event_loop_policy(Policy())
    logger.addFilter(is_foreign)
    try:
        yield
    finally:
        for thread in filter(_is_orbax, threading.enumerate()):
            threading.Thread.join(thread)  # Its own `join` raises what the thread did.
        logger.removeFilter(is_foreign)
        asyncio.set_event_loop_policy(others)


def _is_orbax(thread: threading.Thread) -> bool:
    return thread.name.startswith(_THREAD) or type(thread).__module__.startswith("orbax.")


def _error_number(error: Exception) -> int | None:
    """The operating system's number for what an error is about, if it has one."""
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None
