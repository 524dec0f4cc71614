"""The plots of an evaluation: curves by position, heat maps by layer and KV head, heat maps by depth and length.

Every title has the time of the configuration, so that no figure stands without its speed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..deploy.fidelity import BINS, Fidelity
from .configuration import REFERENCE
from .evaluation_result import Evaluation
from .task_figures import TaskFigures, task_figures

_CURVES: tuple[tuple[str, Callable[[Fidelity], float]], ...] = (
    ("loss of log-probability", lambda fidelity: fidelity.loss),
    ("same most likely token", lambda fidelity: fidelity.agreement),
    ("KL(exact || configuration), nats", lambda fidelity: fidelity.kl),
)
_MAPS = (
    ("mass", "softmax mass kept", "viridis", (0.0, 1.0), "{:.2f}"),
    ("recall", "recall of the 64 largest", "viridis", (0.0, 1.0), "{:.2f}"),
    ("error", "relative output error", "magma_r", (0.0, None), "{:.2f}"),
    ("keys", "keys used", "cividis", (0.0, None), "{:.0f}"),
)
_FEW_CELLS = 12
"""Columns up to which a heat map's cells have their numbers in them."""


def plots(result: Evaluation) -> Iterator[tuple[str, str, Figure]]:
    """Each plot's file name without its ending, a caption, and the plot."""
    if result.windows:
        yield "by_position", "The model's predictions by position in a window.", _curves(result)
    for number, name in enumerate(result.configurations):
        if result.layers_of(name):
            caption = f"{name}: attention by layer and query head, means over queries and query blocks."
            yield f"attention_{number}", caption, _attention_maps(result, name)
    for number, name in enumerate(result.configurations):
        for task in _tasks(result, name):
            caption = f"{name}: {task}, by depth in the context and length of the prompt."
            yield f"{task}_{number}", caption, _task_maps(result, name, task)


def speed(result: Evaluation, name: str) -> str:
    """What stands beside every figure of a configuration."""
    tokens, seconds, exact = result.settings["tokens"], result.seconds(name), result.seconds(REFERENCE)
    ratio = f"{result.time_ratio(name):.2f} of the time of exact ({exact:.3g} s)"
    return f"{tokens} tokens in {seconds:.3g} s, {ratio}, {result.machine['cpu']}"


def _curves(result: Evaluation) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    position = (np.arange(BINS) + 0.5) * result.settings["tokens"] / BINS
    for axes, (label, value) in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for name in result.configurations:
            windows = [[value(part) for part in window.fidelity[name]] for window in result.windows]
            (line,) = axes.plot(position, [value(part) for part in result.by_position(name)])
            axes.fill_between(position, np.min(windows, 0), np.max(windows, 0), color=line.get_color(), alpha=0.15)
        axes.set_xlabel("position, tokens")
        axes.set_title(label, fontsize=10)
        axes.grid(visible=True, alpha=0.3)
        axes.set_xlim(0, result.settings["tokens"])
    labels = [f"{name}: {speed(result, name)}" for name in result.configurations]
    figure.legend(figure.axes[0].get_lines(), labels, loc="outside lower center", fontsize=8)
    return figure


def _attention_maps(result: Evaluation, name: str) -> Figure:
    layers = sorted({layer.layer for layer in result.layers_of(name)})
    heads = len(result.layers_of(name)[0].mass[0])
    figure = Figure(figsize=(max(10.0, 2 + 4 * 0.3 * heads), 1.6 + max(2.0, 0.24 * len(layers))), layout="constrained")
    for axes, (field, label, colours, (low, high), form) in zip(figure.subplots(1, len(_MAPS)), _MAPS, strict=True):
        table = np.array([_of_layer(result, name, layer, field) for layer in layers])
        _heat_map(figure, axes, table, colours, low, high, form)
        axes.set_title(f"{label}\nmean {form.format(table.mean())}", fontsize=9)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        axes.set_xticks(range(heads), [str(head) for head in range(heads)], fontsize=7)
        axes.set_xlabel("query head", fontsize=8)
    figure.axes[0].set_ylabel("layer", fontsize=8)
    figure.suptitle(f"{name}: {speed(result, name)}", fontsize=10)
    return figure


def _of_layer(result: Evaluation, name: str, layer: int, field: str) -> NDArray[Any]:
    """A figure of a layer by query head, the mean over texts and blocks."""
    tables = [getattr(found, field) for found in result.layers_of(name) if found.layer == layer]
    return np.mean([np.mean(table, axis=0) for table in tables], axis=0)


def _tasks(result: Evaluation, name: str) -> list[str]:
    return list(dict.fromkeys(answer.task for answer in result.answers if answer.configuration == name))


def _task_maps(result: Evaluation, name: str, task: str) -> Figure:
    answers = [answer for answer in result.answers if answer.task == task]
    lengths = sorted({answer.tokens for answer in answers})
    depths = sorted({answer.depth for answer in answers})
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(depths)), layout="constrained")
    panels: list[tuple[str, bool, Callable[[TaskFigures], float], bool]] = [
        ("exact, right", True, lambda found: found.exact_right / found.questions, False),
        ("right, question known", True, lambda found: found.right / found.questions, False),
        ("right, not known before", False, lambda found: found.right / found.questions, False),
        ("loss of log-probability\nof the answer, known", True, lambda found: found.logprob_loss, True),
        ("the same, not known before", False, lambda found: found.logprob_loss, True),
    ]
    for axes, (label, known, value, signed) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        table = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, tokens in enumerate(lengths):
                cell = [a for a in answers if (a.depth, a.tokens, a.known) == (depth, tokens, known)]
                found = task_figures(cell, name)
                table[row, column] = np.nan if found is None else value(found)
        most = float(np.nanmax(np.abs(table), initial=0.01)) if signed else 1.0
        _heat_map(figure, axes, table, "coolwarm" if signed else "viridis", -most if signed else 0.0, most, "{:.2f}")
        axes.set_title(label, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(tokens) for tokens in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{(2 * d + 1) / (2 * len(depths)):.0%}" for d in depths], fontsize=8)
        axes.set_xlabel("tokens", fontsize=8)
    figure.axes[0].set_ylabel("depth", fontsize=8)
    figure.suptitle(f"{name}, {task}: {speed(result, name)}", fontsize=10)
    return figure


def _heat_map(
    figure: Figure, axes: Any, table: NDArray[Any], colours: str, low: float, high: float | None, form: str
) -> None:
    """A heat map with its colour bar, and with the numbers in its cells where there is room."""
    image = axes.imshow(table, aspect="auto", cmap=colours, vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, pad=0.02)
    if table.shape[1] > _FEW_CELLS:
        return
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) < 0.5
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=6, color="w" if dark else "k")
