"""A prefix on disk: to the same bits and back, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import iceformer
from iceformer.deploy.prefix_file import ARRAYS, PREFIX, PrefixError
from iceformer.deploy.session import Session
from iceformer.deploy.weights import write_weights

from .conftest import VOCABULARY


def ids_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length).tolist()


DOCUMENT = ids_of(0, 100)


@pytest.fixture(scope="module")
def plain(exact_artifact: Path) -> Session:
    return iceformer.load(exact_artifact, cache_ram=0)


@pytest.fixture
def saved(plain: Session, tmp_path: Path) -> Path:
    plain.save_prefix(DOCUMENT, tmp_path / "prefix", room=20)
    return tmp_path / "prefix"


def test_a_later_session_starts_behind_the_prefix(exact_artifact: Path, plain: Session, saved: Path) -> None:
    chunk = next(bucket for bucket in plain.info.buckets if bucket.capacity >= 120).chunk
    prompt = [*DOCUMENT, *ids_of(1, 9)]
    expected = plain.generate(prompt, 12)
    with iceformer.load(exact_artifact, cache_ram=0) as session:
        tokens = session.load_prefix(saved)
        generation = session.generate(prompt, 12)
        again = session.generate(prompt, 12)
    assert tokens == (len(DOCUMENT) - 1) // chunk * chunk
    assert expected.cached_tokens == 0
    assert generation.cached_tokens == again.cached_tokens == tokens
    assert generation.ids.tolist() == again.ids.tolist() == expected.ids.tolist()


def test_it_counts_the_tokens_that_it_reads(plain: Session, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tokens = plain.save_prefix(
        DOCUMENT, tmp_path / "p", room=20, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (tokens, len(DOCUMENT))


@pytest.mark.parametrize("change", ["cut", "flip", "grow"])
def test_changed_arrays_are_refused(plain: Session, saved: Path, change: str) -> None:
    path = saved / ARRAYS
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[: len(data) // 2]
    elif change == "flip":
        data[len(data) // 2] ^= 1
    else:
        data += b"x"
    path.write_bytes(data)
    with pytest.raises(PrefixError, match=r"cut or changed.*iceformer cache"):
        plain.load_prefix(saved)
    assert plain.generate(DOCUMENT, 2).ids.size == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("keys", []), ("keys", ["00"]), ("keys", None), ("capacity", 7), ("sizes", []), ("sizes", [0]), ("sizes", 1)],
        *[("schema", 1), ("schema", "1"), ("sha256", 5), ("artifact", "00"), ("more", 1)],
    ],
)
def test_changed_descriptions_are_refused(plain: Session, saved: Path, field: str, value: object) -> None:
    path = saved / PREFIX
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(PrefixError, match="iceformer cache"):
        plain.load_prefix(saved)


def test_no_prefix_is_refused(plain: Session, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        plain.load_prefix(tmp_path / "nothing")
    (saved / ARRAYS).unlink()
    with pytest.raises(PrefixError, match=f"lacks {ARRAYS}"):
        plain.load_prefix(saved)
    (saved / PREFIX).write_text("{")
    with pytest.raises(PrefixError, match="JSON"):
        plain.load_prefix(saved)
    (saved / PREFIX).unlink()
    with pytest.raises(PrefixError, match=f"lacks {PREFIX}"):
        plain.load_prefix(saved)


def test_another_artifacts_prefix_is_refused(two_stage_session: Session, saved: Path) -> None:
    with pytest.raises(PrefixError, match="another artifact"):
        two_stage_session.load_prefix(saved)


def test_prompts_without_a_whole_chunk_and_folders_that_exist(plain: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few to keep"):
        plain.save_prefix([5, 6], tmp_path / "short", room=1)
    assert not (tmp_path / "short").exists()
    with pytest.raises(FileExistsError):
        plain.save_prefix(DOCUMENT, tmp_path)


def test_arrays_of_another_shape_are_refused(plain: Session, saved: Path) -> None:
    """As somebody would write them who computes the hash too."""
    file = write_weights(saved / ARRAYS, {"0.0.key": np.zeros(3, np.float32)})
    assert file.sha256 == hashlib.sha256((saved / ARRAYS).read_bytes()).hexdigest()
    content = json.loads((saved / PREFIX).read_text()) | {"sha256": file.sha256}
    (saved / PREFIX).write_text(json.dumps(content))
    with pytest.raises(PrefixError, match="cut or changed"):
        plain.load_prefix(saved)
