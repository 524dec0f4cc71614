"""The artifact's folder: names of its files, writing them, and checking them byte for byte before any is used.

`open_artifact` refuses what was changed, and says whether the machine code fits this host (tier "native") or the
portable StableHLO has to be compiled instead (tier "portable").
"""

import hashlib
import importlib.metadata
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import kernels
from ..host.files import naming
from .agreement import check_agreement
from .cpu import cpu_features, cpu_model, machine
from .manifest import ArtifactError, Environment, FileInfo, Manifest, parse_manifest

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"

Tier = Literal["native", "portable"]

# Flags that leave the code as it is, or (max_isa) that the recorded CPU features already stand for.
_FLAGS_WITHOUT_EFFECT = ("--xla_dump", "--xla_force_host_platform_device_count", "--xla_cpu_max_isa")


@dataclass(frozen=True)
class Artifact:
    """An opened artifact whose files are all there and unchanged.

    Attributes:
        path: the folder.
        manifest: its description.
        differences: why its machine code cannot run here, one clause each; empty if it can.
    """

    path: Path
    manifest: Manifest
    differences: tuple[str, ...]

    @property
    def tier(self) -> Tier:
        """ "native" if the machine code fits this host."""
        return "portable" if self.differences else "native"

    def read(self, file: FileInfo) -> bytes:
        """The bytes of one file, checked again, so that what is used is what was checked."""
        data = (self.path / file.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ArtifactError(_changed(self.path, file.path))
        return data


def open_artifact(path: str | Path) -> Artifact:
    """Checks an artifact: manifest, presence, size and sha256 of every file, then versions and CPU features.

    Files that the manifest does not name are ignored and never read.

    Raises:
        FileNotFoundError: no such folder.
        ArtifactError: not an artifact, a missing file, or one changed since it was compiled.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected an artifact written by `iceformer compile`")
    manifest = _read_manifest(folder)
    with ThreadPoolExecutor() as pool:
        problems = list(filter(None, pool.map(lambda file: _problem(folder, file), manifest.all_files())))
    if problems:
        raise ArtifactError(problems[0])
    return Artifact(folder, manifest, tuple(differences(manifest.environment, host_environment())))


def host_environment() -> Environment:
    """What machine code depends on, as it is in this process."""
    flags = sorted(shlex.split(xla_flags_text()))
    return Environment(
        jax=importlib.metadata.version("jax"),
        jaxlib=importlib.metadata.version("jaxlib"),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        machine=machine(),
        cpu_model=cpu_model(),
        cpu_features=tuple(sorted(cpu_features())),
        xla_flags=tuple(flag for flag in flags if not flag.startswith(_FLAGS_WITHOUT_EFFECT)),
        kernels=kernels.version() or "",
    )


def xla_flags_text() -> str:
    """XLA_FLAGS as this process was started with."""
    return os.environ.get("XLA_FLAGS", "")


def differences(compiled: Environment, host: Environment) -> list[str]:
    """Why machine code of one environment cannot run in another, one clause for each reason."""
    pairs = {
        "jax": (compiled.jax, host.jax),
        "jaxlib": (compiled.jaxlib, host.jaxlib),
        "Python": (compiled.python, host.python),
        "machine": (compiled.machine, host.machine),
        "XLA_FLAGS": (" ".join(compiled.xla_flags) or "(none)", " ".join(host.xla_flags) or "(none)"),
    }
    found = [f"compiled with {name} {then}, but this is {now}" for name, (then, now) in pairs.items() if then != now]
    missing = sorted(set(compiled.cpu_features) - set(host.cpu_features))
    if missing and compiled.machine == host.machine:
        found.append(f"needs the CPU features {' '.join(missing)}, which this CPU lacks")
    if compiled.kernels and compiled.kernels != host.kernels:
        here = f"but this is {host.kernels}" if host.kernels else "which are not built here"
        found.append(f"compiled with kernels {compiled.kernels}, {here}")
    return found


def write_file(folder: Path, name: str, data: bytes) -> FileInfo:
    """Writes one file of an artifact and gives its record."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_bytes(data)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, and its sha256 beside it, as the last files of an artifact.

    Raises:
        ArtifactError: loading would refuse it.
    """
    check_agreement(parse_manifest(text := manifest.to_json()))
    info = write_file(folder, MANIFEST, text.encode())
    write_file(folder, MANIFEST_HASH, f"{info.sha256}  {MANIFEST}\n".encode())


def _read_manifest(folder: Path) -> Manifest:
    for name in (MANIFEST, MANIFEST_HASH):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} lacks {name}: it is not an artifact, or it is incomplete; compile it again")
    data = (folder / MANIFEST).read_bytes()
    expected = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()
    if (folder / MANIFEST_HASH).read_bytes() != expected:
        raise ArtifactError(
            f"{folder / MANIFEST} does not match {MANIFEST_HASH}: one of them was changed after compiling; "
            "copy the artifact again or compile it again"
        )
    manifest = parse_manifest(data)
    check_agreement(manifest)
    return manifest


def _problem(folder: Path, file: FileInfo) -> str | None:
    """What is wrong with a file, or None."""
    path = folder / file.path
    if not path.is_file():
        return f"{folder} lacks {file.path}: copy the artifact again or compile it again"
    if path.stat().st_size != file.size:
        return _changed(folder, file.path)
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if digest == file.sha256 else _changed(folder, file.path)


def _changed(folder: Path, name: str) -> str:
    return (
        f"{folder / name} is not the file that was compiled (its size or sha256 differs from {MANIFEST}): "
        "copy the artifact again or compile it again"
    )
