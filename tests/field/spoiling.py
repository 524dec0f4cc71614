"""Changing artifacts: their manifest, with the hashes made anew, and their weights."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Any], None]


def edit_manifest(artifact: Path, edit: Edit) -> None:
    """Changes manifest.json as JSON, and makes its hash fit."""
    content = json.loads((artifact / "manifest.json").read_text())
    edit(content)
    write_manifest(artifact, json.dumps(content).encode())


def write_manifest(artifact: Path, data: bytes) -> None:
    """Writes manifest.json and its hash."""
    (artifact / "manifest.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (artifact / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def write_vouched(artifact: Path, name: str, data: bytes) -> None:
    """Writes a file of an artifact and makes the manifest vouch for it."""
    (artifact / name).write_bytes(data)
    record = {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def update(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("path") == name and "sha256" in value:
                value.update(record)
            for inner in value.values():
                update(inner)
        elif isinstance(value, list):
            for inner in value:
                update(inner)

    edit_manifest(artifact, update)


def edit_header(artifact: Path, edit: Edit) -> None:
    """Changes the header of the weights as JSON; everything vouches for it."""
    data = (artifact / "weights.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    write_vouched(artifact, "weights.safetensors", len(encoded).to_bytes(8, "little") + encoded + data[end:])


def put(value: object, *keys: Any) -> Edit:
    """An edit that sets one value in a tree."""

    def edit(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return edit
