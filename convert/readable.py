"""Files that are none of what their name says, known by their first bytes before any parser sees them."""

from pathlib import Path

from ..host.messages import shown

_POINTER = b"version https://git-lfs.github.com/spec/"


def check_readable(path: Path) -> None:
    """FileNotFoundError, PermissionError, IsADirectoryError or ValueError for a file that cannot hold anything.

    An empty file, and the pointer that git leaves for a file of git-lfs, are ValueErrors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{shown(path)} is missing")
    if not path.is_file():
        raise IsADirectoryError(f"{shown(path)} is not a file")
    with path.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if not start:
        raise ValueError(f"{shown(path)} is truncated or corrupt (it is empty): download it again")
    if start == _POINTER:
        raise ValueError(f"{shown(path)} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
