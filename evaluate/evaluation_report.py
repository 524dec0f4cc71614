"""An evaluation for people: a table for the terminal, one self-contained HTML page, and the page's plots as PNGs."""

import base64
import html
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..host.files import replacing
from .benchmark_report import BUSY
from .configuration import REFERENCE
from .evaluation_result import Evaluation
from .task_figures import TaskFigures, task_figures

PAGE = "evaluation.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.25em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2em 0; } img { max-width: 100%; } figcaption, .small { color: #555; font-size: 13px; }
"""
_MEANINGS = {
    "time": "seconds of the layers over a window of text, divided by those of exact attention, which took turns with "
    "the configuration in the same process; medians.",
    "loss": "by how much the mean log-probability (natural logarithm) of the text's own next token falls; 0.01 is a "
    "perplexity 1.01 times as high. ± is the standard deviation from window to window.",
    "same token": "share of positions at which the most likely next token is that of exact attention.",
    "KL": "Kullback-Leibler divergence KL(exact || configuration) of the next token, in nats.",
    "last quarter": "the same over the last quarter of every window, where there are the most keys.",
    "mass": "share of the exact softmax that falls on the selected keys, mean over queries, layers and heads.",
    "keys": "keys that the queries of a block and head select: mean, and most.",
    "tasks": "right answers, and right answers with exact attention. An answer is right if every token of it is the "
    "most likely one. Known: the question ends the prompt, in its exact last block. Not known before: it comes after "
    "the context was read, and selects keys like every other query. Loss is that of the answer's log-probability.",
}


def summary_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The head of the summary, and a row for each configuration; the reference is the first."""
    tasks = list(dict.fromkeys((answer.task, answer.known) for answer in result.answers))
    head = ["configuration", "seconds", "time", "loss", "same token", "KL"]
    head += ["loss, last quarter", "same token, last quarter", "mass", "recall", "error", "keys"]
    head += [f"{task}, {'known' if known else 'not known before'}" for task, known in tasks]
    rows = [[REFERENCE, f"{result.seconds(REFERENCE):.3g}", "1.00"] + ["-"] * (len(head) - 3)]
    for name in result.configurations:
        whole, end = result.overall(name), result.last_quarter(name)
        spread = result.spread(name, lambda fidelity: fidelity.loss)
        rows.append(
            [
                name,
                f"{result.seconds(name):.3g}",
                f"{result.time_ratio(name):.2f}",
                f"{whole.loss:+.4f}" + (f" ± {spread:.4f}" if math.isfinite(spread) else ""),
                f"{whole.agreement:.1%}",
                f"{whole.kl:.4f}",
                f"{end.loss:+.4f}",
                f"{end.agreement:.1%}",
                *_attention_cells(result, name),
                *(_task_cell(result, name, task, known) for task, known in tasks),
            ]
        )
    return head, rows


def summary_table(result: Evaluation) -> Table:
    """The summary for the terminal: a column for each configuration."""
    head, rows = summary_rows(result)
    table = Table(title=f"{_title(result)}\n{_where(result)}", box=box.SIMPLE_HEAD)
    for number, row in enumerate([head, *rows]):
        table.add_column(row[0] if number else "", justify="right" if number else "left")
    for line in zip(*(row[1:] for row in [head, *rows]), strict=True):
        table.add_row(*line)
    return table


def check_plots() -> None:
    """ModuleNotFoundError, before any work, if the plots cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the page of an evaluation needs matplotlib: pip install 'iceformer[evaluate]'", name="matplotlib"
        )


def write_report(result: Evaluation, folder: Path) -> Path:
    """Writes the page and its plots.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `evaluate`).
    """
    from .evaluation_plots import plots

    figures = []
    for name, caption, plot in plots(result):
        data = _png(plot)
        with replacing(folder / f"{name}.png") as file:
            file.write(data)
        image = base64.b64encode(data).decode()
        alt = html.escape(caption, quote=True)
        figures.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{image}"><figcaption>{alt}</figcaption></figure>'
        )
    with replacing(folder / PAGE) as file:
        file.write(_page(result, figures).encode())
    return folder / PAGE


def notes(result: Evaluation) -> list[str]:
    """What was left out, and why; and whether the machine had other work."""
    left_out = [f"{level} level not measured: {reason}" for level, reason in result.skipped.items()]
    busy = max((window.busy for window in result.windows), default=0.0)
    if busy <= BUSY:
        return left_out
    return [
        *left_out,
        f"something else used up to {busy:.0%} of the processors, so these seconds are not the configurations' own",
    ]


def _page(result: Evaluation, figures: list[str]) -> str:
    head, rows = summary_rows(result)
    settings = result.settings
    texts = ", ".join(settings["texts"])
    described = [
        f"{len(result.windows)} windows of {settings['tokens']} tokens of {texts}; {_where(result)}.",
        *notes(result),
    ]
    meanings = [f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in _MEANINGS.items()]
    configurations = [
        f"<li><b>{html.escape(name)}</b>: {html.escape(_described(each))}</li>"
        for name, each in settings["configurations"].items()
    ]
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(result))}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(_title(result))}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in described),
        _table(head, rows),
        *figures,
        "<h2>What the figures mean</h2><dl>",
        *meanings,
        "</dl><h2>Configurations</h2><ul class='small'>",
        *configurations,
        "</ul></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A configuration has a column, because there are fewer of them than figures."""
    lines = []
    for number, line in enumerate(zip(head, *rows, strict=True)):
        kind = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in line) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _title(result: Evaluation) -> str:
    return f"What is kept of {result.settings['checkpoint']}"


def _where(result: Evaluation) -> str:
    settings = result.settings
    return f"{settings['dtype']}, {settings['threads']} threads, {result.machine['cpu']}"


def _described(configuration: dict[str, Any]) -> str:
    """A configuration's options in a line."""
    attention = dict(configuration["attention"])
    method = attention.pop("method", None)
    parts = [attention.pop("kind"), *(f"{key} {value}" for key, value in attention.items())]
    if method:
        parts.append(
            "method " + " ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in method.items())
        )
    return ", ".join([*parts, *(f"{name} {configuration[name]}" for name in ("weights", "activations", "kv_dtype"))])


def _attention_cells(result: Evaluation, name: str) -> list[str]:
    figures = result.attention_figures(name)
    if figures is None:
        return ["-"] * 4
    return [
        f"{figures['mass']:.3f}",
        f"{figures['recall']:.3f}",
        f"{figures['error']:.3f}",
        f"{figures['keys']:.0f}, most {figures['most_keys']:.0f}",
    ]


def _task_cell(result: Evaluation, name: str, task: str, known: bool) -> str:
    asked = [answer for answer in result.answers if (answer.task, answer.known) == (task, known)]
    found = task_figures(asked, name)
    return "-" if found is None else _of_task(found)


def _of_task(found: TaskFigures) -> str:
    kept = f"{found.right} of {found.exact_right} right"
    if math.isfinite(found.retention):
        kept += f" ({found.retention:.3f})"
    return f"{kept}, {found.questions} asked, loss {found.logprob_loss:+.3f}"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
