"""A prompt's pieces on disk: the folder that `iceformer cache` writes, with `prefix.json` and the arrays beside it.

It fits the artifact that wrote it and no other, because only the same machine code gives the same bits. Its arrays are
mapped into memory after their hash was checked.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..host import strict_json
from ..host.files import new_folder
from .artifact import Artifact, Tier, host_environment, write_file
from .cache_copy import run_arrays
from .manifest import SHA256, ArrayInfo, ArtifactError, BucketInfo
from .prefix_cache import KeptPiece
from .records import read_record
from .weights import read_weights, write_weights

PREFIX, ARRAYS = "prefix.json", "prefix.safetensors"
SCHEMA = 2


class PrefixError(ValueError):
    """A folder that holds no prefix, a changed one, or one of another artifact."""


@dataclass(frozen=True)
class PrefixInfo:
    """The content of prefix.json.

    Attributes:
        schema: version of this format.
        artifact: `fingerprint` of the artifact.
        capacity: of the bucket.
        sizes: tokens of each piece of the prompt.
        keys: of the pieces, as hex.
        sha256: of the file with the arrays.
    """

    schema: int
    artifact: str
    capacity: int
    sizes: tuple[int, ...]
    keys: tuple[str, ...]
    sha256: str


def fingerprint(artifact: Artifact, tier: Tier) -> str:
    """What the bits of a prefix depend on besides its tokens, as hex: the artifact, and this host where its code was
    compiled here."""
    host = str(host_environment()) if tier == "portable" else ""
    return hashlib.sha256(f"{tier} {host} {artifact.manifest.to_json()}".encode()).hexdigest()


def write_prefix(target: Path, artifact: str, bucket: BucketInfo, pieces: Sequence[KeptPiece]) -> None:
    """Writes the pieces that a prompt begins with, whole or not at all.

    Raises:
        FileExistsError: the target exists.
    """
    arrays = {
        _name(number, layer, name): array
        for number, piece in enumerate(pieces)
        for layer, named in enumerate(piece.layers)
        for name, array in named.items()
    }
    with new_folder(target) as folder:
        file = write_weights(folder / ARRAYS, arrays)
        keys = tuple(piece.key.hex() for piece in pieces)
        sizes = tuple(piece.tokens for piece in pieces)
        info = PrefixInfo(SCHEMA, artifact, bucket.capacity, sizes, keys, file.sha256)
        write_file(folder, PREFIX, (json.dumps(dataclasses.asdict(info), indent=1) + "\n").encode())


def read_prefix(folder: Path, artifact: str, buckets: Sequence[BucketInfo]) -> tuple[int, list[KeptPiece]]:
    """The number of tokens in a folder, and its pieces, mapped into memory.

    Raises:
        FileNotFoundError: no such folder.
        PrefixError: it is no prefix, one of its files was cut or changed, or it was written with another artifact.
    """
    info = _read_info(folder)
    if info.artifact != artifact:
        raise PrefixError(
            f"{folder} was written with another artifact, or with this one on another kind of machine: "
            "write it again with `iceformer cache`"
        )
    bucket = next((bucket for bucket in buckets if bucket.capacity == info.capacity), None)
    tokens = sum(info.sizes)
    if bucket is None or len(info.keys) != len(info.sizes) or not 0 < tokens < bucket.capacity:
        raise PrefixError(_changed(folder / PREFIX))
    path = folder / ARRAYS
    if not path.is_file():
        raise PrefixError(f"{folder} lacks {ARRAYS}: copy the folder again, or write it again with `iceformer cache`")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            raise PrefixError(_changed(path))
    expected = _expected(bucket, info.sizes)
    arrays = {name: array for piece in expected for layer in piece for name, array in layer.values()}
    try:
        views = read_weights(path, arrays)
    except ArtifactError:
        raise PrefixError(_changed(path)) from None
    return tokens, [
        KeptPiece(
            bytes.fromhex(key),
            size,
            tuple({name: views[stored] for name, (stored, _) in layer.items()} for layer in piece),
            mapped=True,
        )
        for key, size, piece in zip(info.keys, info.sizes, expected, strict=True)
    ]


def _expected(bucket: BucketInfo, sizes: Sequence[int]) -> list[tuple[dict[str, tuple[str, ArrayInfo]], ...]]:
    """Of each piece and layer the arrays, and their names in the file."""
    ends = itertools.accumulate(sizes)
    runs = [run_arrays(bucket.cache, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [
        tuple(
            {name: (_name(number, layer, name), array) for name, array in arrays.items()}
            for layer, arrays in enumerate(run)
        )
        for number, run in enumerate(runs)
    ]


def _name(number: int, layer: int, name: str) -> str:
    return f"{number}.{layer}.{name}"


def _read_info(folder: Path) -> PrefixInfo:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected a cache written by `iceformer cache`")
    path = folder / PREFIX
    if not path.is_file():
        raise PrefixError(f"{folder} lacks {PREFIX}: expected a cache written by `iceformer cache`")
    try:
        info = read_record(PrefixInfo, strict_json.parse(path.read_bytes(), str(path)), str(path))
    except ValueError as error:
        raise PrefixError(f"{error}: write it again with `iceformer cache`") from None
    if info.schema != SCHEMA:
        raise PrefixError(
            f"{path} has schema {info.schema} and this iceformer reads schema {SCHEMA}: "
            "write it again with `iceformer cache`"
        )
    if 0 in info.sizes or not all(map(SHA256.fullmatch, info.keys)):
        raise PrefixError(_changed(path))
    return info


def _changed(path: Path) -> str:
    return f"{path} was cut or changed after it was written: copy it again, or write it again with `iceformer cache`"
