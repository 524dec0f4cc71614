"""A benchmark for people: a table of seconds and ratios, sentences, and a plot; all of them name the retention."""

import itertools
import math
import textwrap
from pathlib import Path

from rich import box
from rich.table import Table

from .benchmark_result import TOLERANCE, Benchmark
from .processes import Timing

_STYLES = {
    "two_stage": "C0o-",
    "exact": "C1s-",
    "floor": "C7^:",
    "sdpa": "C3D-",
    "eager": "C5v-",
    "openvino": "C2P-",
    "onnxruntime": "C4X-",
}
BUSY = 0.1
"""Share of the processors that something else may use before a reader is warned."""
_PEERS = {"sdpa": "SDPA", "eager": "eager", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def benchmark_table(result: Benchmark) -> Table:
    """One line for each engine and length.

    `x ours` and `x floor` are an engine's median as a multiple of that of `two_stage` and of `floor`: 2.00 is twice as
    slow. `off exact` is how far its output is from that of `exact`, in standard deviations; a "!" marks an engine that
    should agree and does not.
    """
    caption = f"matrix products reach {result.gemm_flops / 1e9:.0f} GFLOP/s\n{result.retention.brief()}"
    table = Table(
        title=f"{_title(result)}\n{result.machine['cpu']}",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    names = ("tokens", "engine", "seconds", "spread", "tokens/s", "x ours", "x floor", "off exact", "peak MB")
    for name in names:
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for timing in sorted(result.timings, key=lambda timing: timing.length):
        table.add_row(str(timing.length), timing.engine, *_cells(result, timing))
    for timing in result.timings:
        if timing.skipped:
            table.caption = f"{table.caption}\n{timing.engine}, {timing.length} tokens, not measured: {timing.skipped}"
    return table


def summary(result: Benchmark) -> list[str]:
    """Retention, ratios to peers and floor, the floor's share of the machine's peak, growth from length to length."""
    lines = [*result.retention.lines(), _beyond_retention(result), *disturbances(result)]
    for length in result.lengths:
        lines += [_against_peers(result, engine, length) for engine in ("two_stage", "exact")]
        share = result.floor_share_of_peak(length) if result.dense_flops_per_token else math.nan
        if math.isfinite(share):
            lines.append(f"{length} tokens: the dense layers run at {share:.0%} of the matrix product's peak")
    for shorter, longer in itertools.pairwise(result.lengths):
        powers = {engine: result.growth(engine, shorter, longer) for engine in result.engines}
        known = ", ".join(f"{engine} {power:.2f}" for engine, power in powers.items() if math.isfinite(power))
        if known:
            lines.append(f"{shorter} to {longer} tokens: seconds grow with the power {known}")
    return [line for line in lines + _disagreements(result) if line]


def plot(result: Benchmark, path: Path) -> None:
    """Writes a PNG: median seconds over length, both logarithmic, with the spread as bars.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `bench`).
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5.2), layout="constrained")
    for engine, style in _STYLES.items():
        timings = sorted((t for t in result.timings if t.engine == engine and t.seconds), key=lambda t: t.length)
        if timings:
            middle = [timing.median for timing in timings]
            low = [timing.median - min(timing.seconds) for timing in timings]
            high = [max(timing.seconds) - timing.median for timing in timings]
            axes.errorbar([t.length for t in timings], middle, yerr=[low, high], fmt=style, label=engine, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(result.lengths, [str(length) for length in result.lengths])
    axes.set_yscale("log")
    axes.set_xlabel("tokens\n\n" + "\n".join(textwrap.fill(line, 130) for line in result.retention.lines()), fontsize=7)
    axes.set_ylabel("seconds")
    axes.set_title(f"{_title(result)}\n{result.machine['cpu']}", fontsize=9)
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _title(result: Benchmark) -> str:
    settings = result.settings
    what = settings["mode"]
    if what == "attention":
        sizes = settings["model"]
        direction = "causal" if sizes["causal"] else "bidirectional"
        what = f"{direction} attention, {sizes['heads']} heads ({sizes['kv_heads']} KV) of {sizes['head_dim']}"
    return f"{what}, {settings['dtype']}, {settings['threads']} threads, medians of {settings['rounds']}"


def _cells(result: Benchmark, timing: Timing) -> list[str]:
    if timing.skipped:
        return ["not measured"]
    off = "-" if timing.difference is None else f"{timing.difference:.1e}"
    return [
        f"{timing.median:.3f}",
        f"{timing.spread:.0%}",
        f"{timing.length / timing.median:.0f}",
        number(result.ratio(timing.engine, "two_stage", timing.length)),
        number(result.ratio(timing.engine, "floor", timing.length)),
        f"{off} !" if result.agrees(timing) is False else off,
        f"{timing.peak_bytes / 1e6:.0f}",
    ]


def _against_peers(result: Benchmark, engine: str, length: int) -> str:
    """How many times faster one of our engines is than each peer, and how many times slower than the floor."""
    ratios = {name: result.ratio(peer, engine, length) for peer, name in _PEERS.items()}
    parts = [f"{ratio:.2f} x the speed of {name}" for name, ratio in ratios.items() if math.isfinite(ratio)]
    floor = result.ratio(engine, "floor", length)
    if math.isfinite(floor):
        parts.append(f"{floor:.2f} x the time of the floor")
    return f"{length} tokens: {engine} has {', '.join(parts)}" if parts else ""


def _beyond_retention(result: Benchmark) -> str:
    """Says for which of the lengths the retention does not speak."""
    limit = max((kept.tokens for kept in result.retention.kept), default=0)
    beyond = [str(length) for length in result.lengths if length > result.retention.asked[1]]
    return f"retention at {', '.join(beyond)} tokens is not known: the records have {limit}" if limit and beyond else ""


def disturbances(result: Benchmark) -> list[str]:
    """Says at which lengths the machine had other work."""
    busy = {timing.length: timing.busy for timing in result.timings if timing.busy > BUSY}
    return [
        f"{length} tokens: something else used {share:.0%} of the processors, so these seconds are not the engines' own"
        for length, share in busy.items()
    ]


def _disagreements(result: Benchmark) -> list[str]:
    tolerance = TOLERANCE[result.settings["dtype"]]
    return [
        f"{timing.length} tokens: {timing.engine} does not compute what exact does: its output is off by "
        f"{timing.difference:.2g} standard deviations, expected at most {tolerance}"
        for timing in result.timings
        if result.agrees(timing) is False
    ]


def number(value: float) -> str:
    """A ratio, or a dash for one that is not known."""
    return f"{value:.2f}" if math.isfinite(value) else "-"
