"""Fetching a model from the Hugging Face hub: config, tokenizer files and one form of the weights, never code."""

import glob
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .adapter import FILES as ADAPTER_FILES
from .auxiliary_files import AUXILIARY_FILES, CONFIG
from .older_tokenizers import TOKENIZER_SOURCES
from .reader import shard_names
from .sentence_transformers import MODEL_CONFIG, MODULES, TRANSFORMER_CONFIGS, module_path, read_modules
from .weight_files import SINGLE_FILES, is_index, weight_source

_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_BESIDE = (CONFIG, *AUXILIARY_FILES, *TOKENIZER_SOURCES, *ADAPTER_FILES, *TRANSFORMER_CONFIGS)
_WHOLE = (MODULES, MODEL_CONFIG)
"""Files of sentence-transformers, which name the folders of a model's parts."""
# Shards carry any name that their index gives them; in a cache that nothing can be asked of, these.
_SAVED = (
    *_BESIDE,
    *(pattern for name in SINGLE_FILES for pattern in (name, f"{name}.index.json", name.replace(".", "-*.", 1))),
)
_CACHED = (*_WHOLE, *_SAVED, *(f"*/{pattern}" for pattern in _SAVED))


@dataclass(frozen=True)
class Snapshot:
    """A model of the hub on this machine.

    Attributes:
        folder: its files, as they were at the commit.
        name: `name` or `organisation/name`.
        commit: the full hash.
    """

    folder: Path
    name: str
    commit: str


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a model's name on the hub, `name` or `organisation/name`."""
    return _ID.fullmatch(source) is not None and ".." not in source and "--" not in source


def download(name: str, revision: str | None = None, *, progress: bool = False) -> Snapshot:
    """The model's files, from the hub, or from its cache here (under `HF_HOME`) as far as they are there already.

    Where the hub cannot be reached, and with `HF_HUB_OFFLINE=1`, a model that the cache holds whole is taken from it.

    Args:
        name: `name` or `organisation/name`.
        revision: branch, tag or full commit hash; the main branch if None.
        progress: whether to show progress bars on stderr.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError: no such model or revision, or it has no weights in a form that is read.
        PermissionError: the model is gated, and its terms were not accepted.
        ConnectionError: the hub cannot be reached, and the cache does not hold the model.
    """
    with _plain_errors(name, revision), _progress_bars(progress):
        folder = Path(_fetch(name, revision))
    return Snapshot(folder, name, commit=folder.name)


def _fetch(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        info = HfApi().model_info(name, revision=revision)
    except (errors.OfflineModeIsEnabled, HTTPError) as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
            raise  # an answer, of which the cache knows no better
        return snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(_CACHED))
    # By the name of the revision, not its commit: the cache then knows the commit where the hub cannot be asked.
    files = {file.rfilename for file in info.siblings or ()}
    root, *parts = ["."]
    if MODULES in files:
        modules = read_modules(Path(hf_hub_download(name, MODULES, revision=revision)))
        root, *parts = [module_path(module) for module in modules] or ["."]
    try:
        source = weight_source(_names_in(files, root))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} {error}; it holds: {', '.join(sorted(files))}") from None
    wanted = [*_WHOLE, *(_inside(root, beside) for beside in (*_BESIDE, source))]
    if is_index(source):
        index = hf_hub_download(name, _inside(root, source), revision=revision)
        wanted += [_inside(root, shard) for shard in shard_names(Path(index))]
    for part in parts:
        wanted += [_inside(part, file) for file in (CONFIG, *SINGLE_FILES)]
    return snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted])


def _names_in(files: Collection[str], folder: str) -> list[str]:
    """The names of the files that lie in a folder itself."""
    return [path.name for path in map(PurePosixPath, files) if path.parent == PurePosixPath(folder)]


def _inside(folder: str, name: str) -> str:
    return (PurePosixPath(folder) / name).as_posix()


@contextmanager
def _plain_errors(name: str, revision: str | None) -> Iterator[None]:
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is not a folder, and fetching it from the hub needs {error.name}: "
            "pip install 'iceformer[convert]'",
            name=error.name,
        ) from error
    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms at {hub}/{name}, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} at {hub}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model visible at {hub}: check the name, or, if it is private, "
            "log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{hub} cannot be reached"
        raise ConnectionError(
            f"{name} is not a local folder, {why}, and the cache does not contain all of it: download it with "
            "`hf download` on a machine with network access, and give that folder"
        ) from error
    except HTTPError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"{name} cannot be fetched from {hub} ({reason}): try again") from error


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
