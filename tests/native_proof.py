"""Whether the tests with the mark `native` have passed for the sources as they are.

They build the kernels again, for every instruction set and with sanitizers, or sweep over the kernels' options. That
takes minutes, so they run only where something that they test has changed since: native_proof.sha256 holds the digest
that they passed for. It needs no history, so it works in any clone, and scripts/prove_native.sh renews it.
"""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROOF = Path(__file__).with_suffix(".sha256")
TESTED = (
    "attention/custom_calls.py",
    "kernels",
    "scripts/sanitize.sh",
    "setup.py",
    "tests/attention/amx",
    "tests/attention/arm",
    "tests/attention/test_amx.py",
    "tests/attention/test_arm.py",
    "tests/attention/test_native_build.py",
    "tests/attention/test_option_pairs.py",
)
"""Files and folders whose change makes the tests run."""


def digest(root: Path = ROOT) -> str:
    """Of the names and contents of what is tested, in hex."""
    found = hashlib.sha256()
    for name in TESTED:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".sh", ".cpp", ".h"):
                found.update(f"{file.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def holds() -> bool:
    return PROOF.is_file() and PROOF.read_text().strip() == digest()


if __name__ == "__main__":
    PROOF.write_text(digest() + "\n")
