"""The model level of an evaluation: every window of text, with exact attention and every configuration in turn."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Array

from ..deploy.fidelity import Compare, binned, comparison
from ..deploy.reader import Reader
from ..deploy.text_windows import Window
from .bench import Bench
from .configuration import REFERENCE
from .evaluation_result import Evaluation, WindowResult
from .processes import Report, busy_share

ROUNDS = 3
"""Timed passes of each configuration, at least."""


def measure_windows(
    work: Path, result: Evaluation, bench: Bench, windows: Sequence[Window], report: Report
) -> Evaluation:
    """The model level: every window that is not there yet."""
    known = {(window.text, window.start) for window in result.windows}
    missing = [window for window in windows if (window.text, window.start) not in known]
    if not missing:
        return result
    readers: dict[str, Reader] = {}
    comparisons: dict[str, Compare] = {}
    for name in bench.configurations:
        report(f"compiling {name}")
        readers[name] = bench.reader(name)
        readers[name].warm_up()
        comparisons[name] = comparison(bench.model, bench.model_of(name))
    rounds = -(-ROUNDS // len(windows))
    for number, window in enumerate(missing, start=len(known) + 1):
        where = f"window {number} of {len(windows)}"
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        hidden: dict[str, Array] = {}
        busy = busy_share()
        for again in range(rounds):
            for name, reader in readers.items():
                report(f"{where}: {name}" + (f", round {again + 1} of {rounds}" if rounds > 1 else ""))
                hidden[name], took = reader.read(window.ids)
                seconds[name].append(took)
        report(f"{where}: comparing")
        fidelity = {
            name: binned(compare(hidden[REFERENCE], hidden[name], window.ids), window.ids.size)
            for name, compare in comparisons.items()
            if name != REFERENCE
        }
        timed = {name: tuple(values) for name, values in seconds.items()}
        result = result.adding(windows=[WindowResult(window.text, window.start, timed, fidelity, busy)])
        result.save(work)
    return result
