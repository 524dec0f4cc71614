"""Artifacts with random damage: each loads and gives the same numbers, or is refused in one line.

Machine code and StableHLO are not among what is damaged behind a fitting hash: they are code, and whoever makes their
hashes fit may run what he likes. `ICEFORMER_TEST_SEED` gives other damage.
"""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iceformer
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.session import Session

from .spoiling import edit_header, edit_manifest, write_manifest, write_vouched

SEED = int(os.environ.get("ICEFORMER_TEST_SEED", "0"))
IDS = [5, 60, 7, 200]
TEXT = "Hello there"
Damage = Callable[[Path, np.random.Generator], None]

ODD: tuple[object, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        63,
        65,
        2**31,
        2**63,
        10**30,
        0.5,
        1e308,
        float("nan"),
        "",
        "x",
        "float64",
        "../x",
        "\ud800",
    ),
    *("\0", "a\nb\x1b[2J", [], [[]], [-1], [2**62, 2**62], {}, {"a": 1}, json.loads("[" * 300 + "]" * 300)),
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with a key in it."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def change(tree: Any, rng: np.random.Generator) -> None:
    """One to three changes: another value, one from elsewhere in the tree, a field too many, too few, or renamed."""
    for _ in range(rng.integers(1, 4)):
        found = list(places(tree))
        container, key = found[rng.integers(len(found))]
        other, other_key = found[rng.integers(len(found))]
        match rng.integers(5):
            case 0:
                container[key] = ODD[rng.integers(len(ODD))]
            case 1:
                container[key] = copy.deepcopy(other[other_key])
            case 2 if isinstance(container, dict):
                container[f"{key}x"] = container[key]
            case 3 if isinstance(container, dict):
                container[f"{key}x"] = container.pop(key)
            case 4 if isinstance(container[key], int):
                container[key] += int(rng.choice([-1, 1, 64]))
            case _:
                del container[key]


def spoiled(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut off, left out or repeated."""
    changed = bytearray(data)
    at = int(rng.integers(max(len(changed), 1)))
    match rng.integers(4):
        case 0:
            for _ in range(rng.integers(1, 9)):
                changed[rng.integers(len(changed))] = rng.integers(256)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + int(rng.integers(1, 99))]
        case _:
            changed[at:at] = changed[at : at + 99]
    return bytes(changed)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_a_file(folder: Path, rng: np.random.Generator) -> None:
    """Nothing vouches for it."""
    files = files_of(folder)
    file = files[rng.integers(len(files))]
    match rng.integers(3):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(files[rng.integers(len(files))].read_bytes())
        case _:
            file.write_bytes(spoiled(file.read_bytes(), rng))


def change_the_manifest(folder: Path, rng: np.random.Generator) -> None:
    edit_manifest(folder, lambda manifest: change(manifest, rng))


def spoil_the_manifest(folder: Path, rng: np.random.Generator) -> None:
    write_manifest(folder, spoiled((folder / "manifest.json").read_bytes(), rng))


def change_the_header(folder: Path, rng: np.random.Generator) -> None:
    edit_header(folder, lambda header: change(header, rng))


def spoil_the_header(folder: Path, rng: np.random.Generator) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    write_vouched(folder, "weights.safetensors", spoiled(data[:end], rng) + data[end:])


def change_the_tokenizer(folder: Path, rng: np.random.Generator) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # Changes of these would be nearly all that there are.
    kept = {part: tokenizer["model"].pop(part) for part in ("vocab", "merges")}
    change(tokenizer, rng)
    if isinstance(tokenizer.get("model"), dict):
        tokenizer["model"] |= kept
    write_vouched(folder, "tokenizer.json", json.dumps(tokenizer).encode())


def spoil_the_tokenizer(folder: Path, rng: np.random.Generator) -> None:
    write_vouched(folder, "tokenizer.json", spoiled((folder / "tokenizer.json").read_bytes(), rng))


DAMAGES: tuple[Damage, ...] = (
    damage_a_file,
    change_the_manifest,
    spoil_the_manifest,
    change_the_header,
    spoil_the_header,
    change_the_tokenizer,
    spoil_the_tokenizer,
)


def outcome(folder: Path, expected: np.ndarray) -> str:
    """ "refused" or "works", which is the same log-probabilities of ids; a text may be refused or give other ids."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PortableTierWarning)
            session = iceformer.load(folder)
    except (ValueError, OSError) as error:
        check(error)
        return "refused"
    with session:
        # A tampered environment may mean the portable tier, whose compiling takes seconds.
        if session.tier == "portable":
            return "works"
        np.testing.assert_array_equal(session.score(IDS).logprobs, expected)
        ask(session)
    return "works"


def ask(session: Session) -> None:
    try:
        session.generate(TEXT, 2)
        session.detokenize(IDS)
    except (ValueError, OSError) as error:
        check(error)


def check(error: Exception) -> None:
    """One line of bounded length that is a sentence."""
    message = str(error)
    assert len(message) < 1000, message[:1000]
    assert "\n" not in message, message
    assert message


def attack(artifact: Path, work: Path, rounds: int, seed: int) -> dict[str, int]:
    """How often each outcome came up."""
    with iceformer.load(artifact) as session:
        expected = session.score(IDS).logprobs
    counts = {"refused": 0, "works": 0}
    for index in range(rounds):
        rng = np.random.default_rng([seed, index])
        folder = shutil.copytree(artifact, work / "artifact")
        damage = DAMAGES[index % len(DAMAGES)]
        try:
            damage(folder, rng)
            counts[outcome(folder, expected)] += 1
        except Exception as error:
            error.add_note(f"{damage.__name__}, seed {[seed, index]}")
            raise
        shutil.rmtree(folder)
    return counts


def test_damage_is_refused_or_harmless(artifact: Path, tmp_path: Path) -> None:
    counts = attack(artifact, tmp_path, 70, SEED)
    assert counts["refused"] > 35


@pytest.mark.slow
def test_much_damage_within_bounds(artifact: Path, tmp_path: Path) -> None:
    """In a process of its own, so that a crash is seen as one: no more than 2 GB beyond what it begins with."""
    code = (
        "import sys; from pathlib import Path; from tests.field.test_fuzz_artifacts import bounded; "
        "print(bounded(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(artifact), str(tmp_path), str(SEED)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def bounded(artifact: Path, work: Path, seed: int) -> dict[str, int]:
    """The outcomes of many rounds, none of which may take much memory."""
    attack(artifact, work, 7, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = attack(artifact, work, 1400, seed + 1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 * 1024**2, f"{grown} KiB more"
    return counts
