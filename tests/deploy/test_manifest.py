"""Strict parsing: each kind of damage is one sentence that names the field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iceformer.deploy.manifest import SCHEMA, ArtifactError, parse_manifest


def drop(*path: Any) -> Callable[[Any], None]:
    def edit(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return edit


def put(new: Any, *path: Any) -> Callable[[Any], None]:
    def edit(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = new

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(1, "schema"), f"has schema 1 and this iceformer reads schema {SCHEMA}: compile the artifact again"),
        (drop("schema"), "has schema None"),
        (drop("environment", "jaxlib"), "lacks field environment.jaxlib"),
        (put("x", "environment", "hostname"), "has an unknown field environment.hostname"),
        (put("1", "batch"), 'has "1" in batch, expected an integer'),
        (put(True, "batch"), "has true in batch, expected an integer"),
        (put(-1, "batch"), "has -1 in batch, expected an integer that is not negative"),
        (put(None, "dtype"), "has null in dtype, expected a string"),
        (put([], "buckets"), r"has buckets \[\], expected ascending capacities"),
        (put({}, "buckets"), "in buckets, expected a list"),
        (put(0, "buckets", 1, "capacity"), r"has buckets \[64, 0\]"),
        (put(7, "buckets", 0, "chunk"), "has chunk 7 in bucket 64, expected a divisor"),
        (drop("buckets", 0, "entries", "decode"), r"has entries \['prefill', 'check', 'score'\] in bucket 64"),
        (
            put("a", "buckets", 0, "entries", "decode", "arguments", "tokens", "shape", 0),
            r"shape\[0\], expected an integer",
        ),
        (put("../secret", "weights", "file", "path"), "names the file '../secret', which is not a path inside"),
        (put("/etc/passwd", "files", 0, "path"), "names the file '/etc/passwd'"),
        (put(3, "files", 0), r"has 3 in files\[0\], expected an object"),
    ],
)
def test_damage_is_named(exact_artifact: Path, edit: Callable[[Any], None], message: str) -> None:
    value = json.loads((exact_artifact / "manifest.json").read_text())
    edit(value)
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(json.dumps(value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"^manifest\.json"):
        parse_manifest(text)
