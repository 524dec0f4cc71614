"""A benchmark for people: a table of seconds and ratios, and a plot of seconds over length."""

import itertools
import math
from pathlib import Path

from rich.table import Table

from .benchmark import Benchmark, Timing

_STYLES = {"two_stage": "C0o-", "exact": "C1s-", "floor": "C7^:", "sdpa": "C3D-", "eager": "C5v-"}


def benchmark_table(result: Benchmark) -> Table:
    """One line for each engine and length, its median also as a multiple of that of `two_stage` and of the floor."""
    settings = result.settings
    table = Table(
        title=f"prefill, {settings['dtype']}, {settings['threads']} threads, medians of {settings['rounds']}",
        caption=f"{result.machine['cpu']}; matrix products reach {result.gemm_flops / 1e9:.0f} GFLOP/s",
    )
    for name in ("tokens", "engine", "seconds", "spread", "tokens/s", "x ours", "x floor", "peak MB"):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for timing in sorted(result.timings, key=lambda timing: timing.length):
        table.add_row(str(timing.length), timing.engine, *_cells(result, timing))
    return table


def summary(result: Benchmark) -> list[str]:
    """The floor's share of the machine's peak, and how the time grows from length to length."""
    lengths = sorted({timing.length for timing in result.timings})
    lines = []
    for length in lengths:
        share = result.floor_share_of_peak(length)
        if math.isfinite(share):
            lines.append(f"{length} tokens: the dense layers run at {share:.0%} of the matrix product's peak")
    for shorter, longer in itertools.pairwise(lengths):
        growth = result.growth("two_stage", shorter, longer)
        if math.isfinite(growth):
            lines.append(f"{shorter} to {longer} tokens: two-stage time grows with the power {growth:.2f}")
    return lines


def plot(result: Benchmark, path: Path) -> None:
    """Writes a PNG: median seconds over length, both logarithmic, with the spread as bars.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `bench`).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for engine, style in _STYLES.items():
        timings = sorted((t for t in result.timings if t.engine == engine and t.seconds), key=lambda t: t.length)
        if timings:
            middle = [timing.median for timing in timings]
            low = [timing.median - min(timing.seconds) for timing in timings]
            high = [max(timing.seconds) - timing.median for timing in timings]
            axes.errorbar([t.length for t in timings], middle, yerr=[low, high], fmt=style, label=engine, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("prefill, seconds")
    axes.set_title(f"{result.settings['dtype']}, {result.settings['threads']} threads, {result.machine['cpu']}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cells(result: Benchmark, timing: Timing) -> list[str]:
    if timing.skipped:
        return [f"not measured: {timing.skipped}", *[""] * 5]
    spread = (max(timing.seconds) - min(timing.seconds)) / timing.median
    return [
        f"{timing.median:.3f}",
        f"{spread:.0%}",
        f"{timing.length / timing.median:.0f}",
        _ratio(timing.median, result.median("two_stage", timing.length)),
        _ratio(timing.median, result.median("floor", timing.length)),
        f"{timing.peak_bytes / 1e6:.0f}",
    ]


def _ratio(seconds: float, base: float) -> str:
    return f"{seconds / base:.2f}" if math.isfinite(base) else "-"
