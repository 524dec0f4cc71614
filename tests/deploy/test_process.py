"""A fresh process that loads and runs an artifact: what it imports, and that it traces and compiles nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import jax

events = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
jax.config.update("jax_log_compiles", True)

import numpy as np
import iceformer

session = iceformer.load(sys.argv[1])
generation = session.generate("Once upon a time" * 4, max_new_tokens=4)
scores = session.score([np.arange(10, 90), np.arange(10, 20)])
session.generate([4, 5], max_new_tokens=3, temperature=1.0)
assert session.tier == "native" and len(generation.text) > 0 and len(scores) == 2
quiet = list(events)
jax.jit(lambda x: x + 1)(1)
print(json.dumps({"modules": sorted(sys.modules), "events": quiet, "control": events[len(quiet):]}))
"""


@pytest.fixture(scope="module")
def run(exact_artifact: Path) -> dict[str, list[str]]:
    """What the process prints, after a check that it logged no compilation before its last line."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(exact_artifact)], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(result.stdout)


def test_imports_nothing_that_only_compiling_needs(run: dict[str, list[str]]) -> None:
    packages = {name.partition(".")[0] for name in run["modules"]}
    assert not packages & {
        "flax",
        "transformers",
        "orbax",
        "torch",
        "jaxtyping",
        "beartype",
        "pydantic",
        "rich",
        "typer",
    }
    assert "tokenizers" in packages


def test_traces_and_compiles_nothing(run: dict[str, list[str]]) -> None:
    def compiles(events: list[str]) -> list[str]:
        return [event for event in events if "trace" in event or "compile" in event or "jaxpr_to_mlir" in event]

    assert compiles(run["events"]) == []
    assert len(compiles(run["control"])) >= 3
