"""The child's side of an engine's process. Imports numpy and the standard library only: it runs in any interpreter.

`serve` prepares an engine, runs it once to warm it up, writes what came out as a .npy file, and prints
`{"ready": seconds}`. Then each line on stdin times one run and prints `{"seconds": ...}`, and the end of stdin ends it
with `{"peak_bytes": ...}`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Engine:
    """An engine with its input in place.

    Attributes:
        run: what is timed. A float that it returns is taken as its seconds, in place of the time of the call.
        output: does the same and gives the result in float32; None if it has nothing to compare.
    """

    run: Callable[[], object]
    output: Callable[[], Any]


def serve(output: str, prepare: Callable[[], Engine]) -> None:
    """Prepares the engine, then answers until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # Whose lines appear in the order in which they were written.

    def answer(**fields: float) -> None:
        answers.write(json.dumps(fields) + "\n")

    start = time.perf_counter()
    engine = prepare()
    result = engine.output()
    if result is not None:
        np.save(output, result)
    answer(ready=time.perf_counter() - start)
    for _ in sys.stdin:
        start = time.perf_counter()
        own = engine.run()
        answer(seconds=own if isinstance(own, float) else time.perf_counter() - start)
    answer(peak_bytes=float(_peak_bytes()))


def _peak_bytes() -> int:
    """The largest resident memory of this process; getrusage would count that of its parent before exec too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
