"""What an artifact holds, as rich tables for `iceformer compile` and `iceformer inspect`."""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .manifest import Manifest, WeightLoss

MEGABYTE = 1e6


def code_table(manifest: Manifest) -> Table:
    """One line for each bucket and entry: size of the machine code, memory of a call, compile time."""
    table = Table(title="compiled code", caption=f"batch {manifest.batch}, {manifest.dtype}")
    for name in ("bucket", "entry", "code MB", "temp MB", "cache MB", "compile s"):
        table.add_column(name, justify="left" if name == "entry" else "right")
    for bucket in manifest.buckets:
        for name, entry in bucket.entries.items():
            table.add_row(
                str(bucket.capacity),
                name,
                f"{entry.native.size / MEGABYTE:.2f}",
                f"{entry.memory.temp_bytes / MEGABYTE:.1f}",
                f"{bucket.cache.size_in_bytes / MEGABYTE:.1f}",
                f"{entry.compile_seconds:.1f}",
            )
        table.add_section()
    return table


def attention_tables(manifest: Manifest) -> list[Table]:
    """The attention of each bucket and why, then what was measured to choose it, if anything was."""
    table = Table(title="attention of prompts and scoring")
    table.add_column("bucket", justify="right")
    table.add_column("attention")
    table.add_column("why")
    for bucket in manifest.buckets:
        table.add_row(str(bucket.capacity), describe(bucket.attention), bucket.attention_reason)
    return [table, _crossover_table(manifest)] if manifest.crossover else [table]


def _crossover_table(manifest: Manifest) -> Table:
    table = Table(title="the crossover, measured", caption="one chunk of a prompt, some heads of one layer")
    for name in CROSSOVER_COLUMNS:
        table.add_column(name, justify="right")
    for row in crossover_rows(manifest):
        table.add_row(*row)
    return table


CROSSOVER_COLUMNS = ("keys", "exact ms", "two-stage ms", "ratio")


def crossover_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """The cells of what was measured to find the crossover, for `CROSSOVER_COLUMNS`."""
    return [
        (str(row.keys), f"{row.exact_seconds * 1e3:.1f}", f"{row.two_stage_seconds * 1e3:.1f}", f"{row.ratio:.2f}")
        for row in manifest.crossover
    ]


WEIGHT_LOSS_COLUMNS = ("text", "tokens", "nll before", "nll after", "difference", "same most likely token")


def weight_loss_row(loss: WeightLoss) -> tuple[str, ...]:
    """The cells of what rounding the weights cost, for `WEIGHT_LOSS_COLUMNS`; nll in nats a token."""
    return (
        loss.text,
        str(loss.tokens),
        f"{loss.nll:.4f}",
        f"{loss.rounded_nll:.4f}",
        f"{loss.rounded_nll - loss.nll:+.4f}",
        f"{loss.greedy_agreement:.2%}",
    )


def weight_tables(manifest: Manifest) -> list[Table]:
    """What rounding the weights cost; no table if they are not rounded."""
    weights = manifest.weights
    if weights.loss is None:
        return []
    table = Table(
        title=f"{weights.format} weights", caption="exact attention, before and after the weights were rounded"
    )
    for name in WEIGHT_LOSS_COLUMNS:
        table.add_column(name, justify="left" if name == "text" else "right")
    table.add_row(*weight_loss_row(weights.loss))
    return [table]


def summary_table(manifest: Manifest) -> Table:
    """What was compiled, for which machine, and where it came from."""
    model, environment, provenance = manifest.model, manifest.environment, manifest.provenance
    calibration = provenance.calibration
    rows = {
        "model": f"{model.model_type}, {model.parameters / 1e6:.2f}M parameters, {manifest.dtype}",
        "context": f"{model.max_position_embeddings} tokens; buckets {_join(b.capacity for b in manifest.buckets)}",
        "vocabulary": f"{model.vocab_size} ids; a text ends at {_join(model.eos_token_ids) or 'no id'}",
        "calibrated on": f"{calibration.kind}, {calibration.tokens} tokens" if calibration else "-",
        "weights": f"{manifest.weights.file.size / MEGABYTE:.1f} MB in {len(manifest.weights.names)} tensors"
        f"{'' if manifest.weights.format == 'same' else f', linear layers in {manifest.weights.format}'}",
        "compiled": f"{manifest.created} by iceformer {manifest.iceformer}",
        "with": f"jax {environment.jax}, jaxlib {environment.jaxlib}, Python {environment.python}",
        "for": f"{environment.machine} ({environment.cpu_model}): {_join(environment.cpu_features)}",
        "native kernels": environment.kernels or "-",
        "XLA_FLAGS": _join(environment.xla_flags) or "-",
        "checkpoint": provenance.checkpoint,
        "source": json.dumps(provenance.source.get("source", "-")),
    }
    table = Table(title="artifact", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def file_table(manifest: Manifest) -> Table:
    """Every file of the artifact with its size and the start of its sha256."""
    table = Table(title="files")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    for file in manifest.all_files():
        table.add_row(file.path, f"{file.size}", file.sha256[:16])
    return table


def describe(attention: Mapping[str, Any]) -> str:
    """The attention's configuration in one line."""
    if attention["kind"] == "dense":
        return "exact"
    method = dict(attention["method"])
    name = method.pop("name")
    options = {key: value for key, value in attention.items() if key not in ("kind", "method")} | method
    return f"two-stage, {name}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def _join(values: Any) -> str:
    return " ".join(str(value) for value in values)
