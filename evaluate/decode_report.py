"""A decoding benchmark for people: a table, sentences, and a plot of milliseconds and of shares of the bandwidth."""

import math
from pathlib import Path

from rich import box
from rich.table import Table

from .benchmark_report import disturbances, number
from .benchmark_result import Benchmark
from .processes import Timing

_STYLES = {
    "two_stage": "C0o-",
    "exact": "C1s-",
    "selection": "C7^-",
    "sdpa": "C3D-",
    "openvino_genai": "C2P-",
    "openvino_genai_xattention": "C5v-",
    "llama_cpp": "C4X-",
}


def decode_table(result: Benchmark) -> Table:
    """One line for each engine and depth.

    `x exact` is an engine's median as a multiple of that of `exact`: 2.00 is twice as slow. `tokens/s` counts all rows
    of the batch, and `MB a token` what is read for one token of each.
    """
    table = Table(
        title=f"{_title(result)}\n{result.machine['cpu']}",
        caption=f"the machine reads {result.read_bandwidth / 1e9:.1f} GB/s",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    names = ("engine", "depth", "ms a token", "spread", "tokens/s", "MB a token", "of bandwidth", "x exact")
    for name in names:
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for timing in sorted(result.timings, key=lambda timing: timing.length):
        table.add_row(timing.engine, str(timing.length), *_cells(result, timing))
        if timing.skipped:
            table.caption = f"{table.caption}\n{timing.engine}, {timing.length} tokens, not measured: {timing.skipped}"
    return table


def decode_summary(result: Benchmark) -> list[str]:
    """What a reader should know besides the table."""
    return ["bytes are by formula; what an answer loses is not measured here", *disturbances(result)]


def decode_plot(result: Benchmark, path: Path) -> None:
    """Writes a PNG: milliseconds of a token and share of the bandwidth, over depth.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `bench`).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (times, shares) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for engine, style in _STYLES.items():
        timings = sorted((t for t in result.timings if t.engine == engine and t.seconds), key=lambda t: t.length)
        if timings:
            depths = [t.length for t in timings]
            low = [(t.median - min(t.seconds)) * 1e3 for t in timings]
            high = [(max(t.seconds) - t.median) * 1e3 for t in timings]
            middle = [t.median * 1e3 for t in timings]
            times.errorbar(depths, middle, yerr=[low, high], fmt=style, label=engine, capsize=3)
            shares.plot(depths, [100 * result.share_of_bandwidth(t) for t in timings], style)
    for axes, label in ((times, "ms a token"), (shares, f"% of {result.read_bandwidth / 1e9:.1f} GB/s")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(result.lengths, [str(length) for length in result.lengths])
        axes.set_xlabel("depth in tokens")
        axes.set_ylabel(label)
        axes.grid(visible=True, which="both", alpha=0.3)
    times.set_ylim(bottom=0)
    if times.get_legend_handles_labels()[0]:
        times.legend(fontsize=8)
    figure.suptitle(f"{_title(result)}\n{result.machine['cpu']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _title(result: Benchmark) -> str:
    settings = result.settings
    formats = f"{settings['dtype']}, weights {settings['weights']}, KV cache {settings['kv_dtype']}"
    rows = f"batch {settings['batch']}, {settings['threads']} threads, medians of {settings['rounds']}"
    return f"decode, {formats}, {rows}"


def _cells(result: Benchmark, timing: Timing) -> list[str]:
    if timing.skipped:
        return ["not measured"]
    share = result.share_of_bandwidth(timing)
    return [
        f"{timing.median * 1e3:.2f}",
        f"{timing.spread:.0%}",
        f"{result.settings['batch'] / timing.median:.1f}",
        f"{timing.token_bytes / 1e6:.1f}" if timing.token_bytes else "-",
        f"{share:.0%}" if math.isfinite(share) else "-",
        number(result.ratio(timing.engine, "exact", timing.length)),
    ]
