"""What an artifact holds, as rich tables for `iceformer compile` and `iceformer inspect`."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from .evidence import name_of, positions_of
from .generation_defaults import generation_rows
from .manifest import BucketInfo, ContractInfo, CrossoverRow, Manifest, ModelInfo, QuantizationError, WeightsInfo

MEGABYTE = 1e6
ATTENTION_OF = {"decoder": "prompts and scoring", "encoder": "encoding"}
_MEASURED_CALL = {"decoder": "one chunk of a prompt", "encoder": "one whole row"}


def code_table(manifest: Manifest) -> Table:
    """One line for each bucket and entry: size of the machine code, memory of a call, compile time."""
    table = Table(title="compiled code", caption=f"batch {manifest.batch}, {manifest.dtype}")
    for name in ("bucket", "entry", "code MB", "temp MB", "output MB", "cache MB", "compile s"):
        table.add_column(name, justify="left" if name == "entry" else "right")
    for bucket in manifest.buckets:
        for row in code_rows(bucket):
            table.add_row(*row)
        table.add_section()
    return table


def code_rows(bucket: BucketInfo) -> list[tuple[str, ...]]:
    """The cells of a bucket's entries: capacity, name, megabytes of code, temporary memory, results and KV cache, and
    seconds of compiling.
    """
    cache = bucket.cache.size_in_bytes
    return [
        (
            str(bucket.capacity),
            name,
            f"{entry.native.size / MEGABYTE:.2f}",
            f"{entry.memory.temp_bytes / MEGABYTE:.1f}",
            # What comes out of the call includes the cache, which is the one that went in.
            f"{(entry.memory.output_bytes - cache) / MEGABYTE:.1f}",
            f"{cache / MEGABYTE:.1f}" if bucket.cache.layers else "-",
            f"{entry.compile_seconds:.1f}",
        )
        for name, entry in bucket.entries.items()
    ]


def attention_tables(manifest: Manifest) -> list[Table]:
    """The attention of each bucket and why, then what was measured to choose it, if anything was."""
    table = Table(title=f"attention of {ATTENTION_OF[manifest.model.kind]}")
    table.add_column("bucket", justify="right")
    table.add_column("attention")
    table.add_column("why")
    for bucket in manifest.buckets:
        table.add_row(str(bucket.capacity), describe_plan(bucket.plan), bucket.plan_reason)
    tables = [table, _dispatch_table(manifest)]
    tables += [_crossover_table(*measured) for measured in crossovers(manifest)]
    if manifest.contract is not None and (rows := evidence_rows(manifest)):
        tables.append(_contract_table(manifest.contract, rows))
    return tables


def _dispatch_table(manifest: Manifest) -> Table:
    """What computes the attention of each entry's layers, and why."""
    table = Table(title="attention of each entry, as compiled for this kind of CPU")
    table.add_column("bucket", justify="right")
    table.add_column("entry")
    table.add_column("layers", justify="right")
    table.add_column("computed")
    for bucket in manifest.buckets:
        for name, entry in bucket.entries.items():
            for computed, layers in entry.attention.items():
                table.add_row(str(bucket.capacity), name, str(layers), computed)
    return table


def product_tables(manifest: Manifest) -> list[Table]:
    """Who multiplies bfloat16 with the weights, if that was measured."""
    if not manifest.products:
        return []
    table = Table(title="products of bfloat16, measured", caption=product_call(manifest))
    for column in PRODUCT_COLUMNS:
        table.add_column(column, justify="left" if column == "computed" else "right")
    for row in product_rows(manifest):
        table.add_row(*row)
    return [table]


def product_call(manifest: Manifest) -> str:
    """What was timed."""
    return f"{manifest.products[0].rows} rows with the weights of a layer; a few rows are always the kernel's"


def product_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """What was measured of the products of bfloat16, as cells for `PRODUCT_COLUMNS`."""
    return [
        (
            f"{row.in_features} x {row.out_features}",
            _milliseconds(row.kernel_seconds),
            _milliseconds(row.xla_seconds),
            "in a kernel" if row.in_kernel else "in XLA",
        )
        for row in manifest.products
    ]


def _crossover_table(name: str, call: str, rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=f"{name}, measured", caption=call)
    for column in CROSSOVER_COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _contract_table(contract: ContractInfo, rows: Iterable[tuple[str, ...]]) -> Table:
    caption = f"{positions_of(contract.held_out.kind)}; seconds of one prompt"
    table = Table(title=f"contract: {contract.asked}", caption=caption)
    for column in EVIDENCE_COLUMNS:
        table.add_column(column, justify="left" if column in _WORDS else "right")
    for row in rows:
        table.add_row(*row)
    return table


_LABELS_SHOWN = 8
EVIDENCE_COLUMNS = ("bucket", "attention", "weights", "KV cache", "seconds", "same token", "KL", "loss", "contract")
_WORDS = ("attention", "weights", "KV cache", "contract")
PRODUCT_COLUMNS = ("weights", "kernel ms", "XLA ms", "computed")
CROSSOVER_COLUMNS = ("keys", "exact ms", "selecting ms", "ratio")


def crossovers(manifest: Manifest) -> Iterator[tuple[str, str, list[tuple[str, ...]]]]:
    """Of each crossover that was measured, of prompts and of new tokens: its name, what was timed, and the cells for
    `CROSSOVER_COLUMNS`."""
    if manifest.crossover:
        call = f"{_MEASURED_CALL[manifest.model.kind]}, some heads of one layer"
        yield "the crossover", call, _crossover_rows(manifest.crossover)
    if manifest.decode_crossover:
        yield "the crossover of decoding", "one new token in one layer", _crossover_rows(manifest.decode_crossover)


def _crossover_rows(measured: Iterable[CrossoverRow]) -> list[tuple[str, ...]]:
    return [
        (str(row.keys), _milliseconds(row.exact_seconds), _milliseconds(row.two_stage_seconds), f"{row.ratio:.2f}")
        for row in measured
    ]


def evidence_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """What was measured for the contract, as cells for `EVIDENCE_COLUMNS`: KL and loss in nats."""
    return [
        (
            str(bucket.capacity),
            name_of(each.attention),
            manifest.dtype if each.weights == "same" else each.weights,
            each.kv_dtype,
            f"{each.seconds:.3g}",
            f"{each.agreement:.2%}",
            f"{each.kl:.4f}",
            f"{each.loss:+.4f}",
            f"{'holds' if each.holds else 'does not hold'}{', chosen' * each.chosen}",
        )
        for bucket in manifest.buckets
        for each in bucket.evidence
    ]


def _milliseconds(seconds: float) -> str:
    """With a decimal, or three where that would say little."""
    return f"{seconds * 1e3:.{1 if seconds >= 1e-3 else 3}f}"


def quantization_error_cells(error: QuantizationError) -> dict[str, str]:
    """What rounding the weights cost, by the names of the columns; nll in nats a token."""
    cells = {"text": error.text, "tokens": str(error.tokens)}
    if error.nll is not None and error.rounded_nll is not None:
        cells |= {
            "nll before": f"{error.nll:.4f}",
            "nll after": f"{error.rounded_nll:.4f}",
            "difference": f"{error.rounded_nll - error.nll:+.4f}",
        }
    if error.greedy_agreement is not None:
        cells["same most likely token"] = f"{error.greedy_agreement:.2%}"
    if error.cosine is not None:
        cells["cosine of hidden states"] = f"{error.cosine:.6f}"
    return cells


def rounding_tables(manifest: Manifest) -> list[Table]:
    """What rounding the weights cost, and rounding keys and values; no table of what is not rounded."""
    weights = manifest.weights
    beside = "" if manifest.activations == "same" else f", {manifest.activations} activations"
    note = f"; {describe_rounding(weights)}" if weights.unseen_experts else ""
    rounded = {
        f"{weights.format} weights{beside}": (weights.error, note),
        f"{manifest.kv_dtype} keys and values": (manifest.kv_error, ""),
    }
    return [_rounding_table(title, error, note) for title, (error, note) in rounded.items() if error is not None]


def _rounding_table(title: str, error: QuantizationError, note: str) -> Table:
    table = Table(title=title, caption=f"exact attention, before and after rounding{note}")
    cells = quantization_error_cells(error)
    for name in cells:
        table.add_column(name, justify="left" if name == "text" else "right")
    table.add_row(*cells.values())
    return table


def summary_table(manifest: Manifest) -> Table:
    """What was compiled, for which machine, and where it came from."""
    model, environment, provenance = manifest.model, manifest.environment, manifest.provenance
    calibration = provenance.calibration
    rows = {
        "model": f"{model.model_type} ({model.kind}), {model.parameters / 1e6:.2f}M parameters, {manifest.dtype}",
        "task": describe_task(model),
        "context": f"{_context(model)}; buckets {_join(b.capacity for b in manifest.buckets)}",
        **_vocabulary(model),
        **text_rows(manifest),
        **generation_rows(model.generation),
        "calibrated on": f"{calibration.kind}, {calibration.tokens} tokens" if calibration else "-",
        **_contract(manifest),
        "weights": f"{manifest.weights.file.size / MEGABYTE:.1f} MB in {len(manifest.weights.tensors)} tensors"
        f"{_weight_format(manifest.weights)}"
        f"{'' if manifest.activations == 'same' else f', activations rounded to {manifest.activations}'}",
        **_kv_cache(manifest),
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
        table.add_row(name, Text(value, "yellow") if name == "not applied" else value)
    return table


def _weight_format(weights: WeightsInfo) -> str:
    if weights.format == "same":
        return ""
    scales = f", a scale for {weights.group} inputs" if weights.group else ""
    return f", linear layers in {weights.format}{scales}, {describe_rounding(weights)}"


def describe_rounding(weights: WeightsInfo) -> str:
    """How weights were rounded."""
    if weights.rounding == "gptq":
        count = weights.unseen_experts
        unseen = f", of which {count} expert{'s' * (count > 1)} got none" if count else ""
        return f"rounded by GPTQ for {weights.fitted_tokens} tokens of text{unseen}"
    return "each rounded to its nearest"


def file_table(manifest: Manifest) -> Table:
    """Every file of the artifact with its size and the start of its sha256."""
    table = Table(title="files")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    for file in manifest.all_files():
        table.add_row(file.path, f"{file.size}", file.sha256[:16])
    return table


def describe_task(model: ModelInfo) -> str:
    """What the model is for, and the first of its classes."""
    shown = ", ".join(model.labels[:_LABELS_SHOWN]) + (", ..." if len(model.labels) > _LABELS_SHOWN else "")
    return model.task.replace("_", " ") + (f" into {len(model.labels)} classes: {shown}" if shown else "")


def text_rows(manifest: Manifest) -> dict[str, str]:
    """How the model takes texts, as far as its files say something of it, by name."""
    text = manifest.model.text
    if text is None:
        return {}
    rows = {}
    if text.embedding:
        size = manifest.buckets[0].entries["encode"].results["pooled"].shape[-1]
        kept = min(size, text.truncate_dim or size)
        like = f", to compare by {text.similarity_fn_name}" if text.similarity_fn_name else ""
        rows["embedding"] = f"{', '.join(text.embedding)}; {kept} {f'of {size} ' * (kept < size)}numbers{like}"
    if any(text.prompts.values()):
        rows["prompts"] = ", ".join(
            f"{name}{' (default)' * (name == text.default_prompt_name)} {json.dumps(prompt, ensure_ascii=False)}"
            for name, prompt in text.prompts.items()
        )
    if text.max_seq_length is not None:
        side = "" if text.truncation_side == "right" else ", from the left"
        rows["texts"] = f"cut at {text.max_seq_length} tokens{side}"
    if text.score_activation is not None:
        rows["scores"] = f"logits, {text.score_activation}"
    return rows


def describe_plan(plan: Mapping[str, Mapping[str, Any]]) -> str:
    """A bucket's plan in one line."""
    prompt, decode = (_describe(plan[name]) for name in ("prompt", "decode"))
    return prompt if decode == "exact" else f"{prompt}; of new tokens {decode}"


def _describe(attention: Mapping[str, Any]) -> str:
    kind = attention["kind"].replace("_", "-")
    if "method" not in attention:
        return kind
    method = dict(attention["method"])
    name = method.pop("name")
    options = {key: value for key, value in attention.items() if key not in ("kind", "method")} | method
    return f"{kind}, {name}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def _context(model: ModelInfo) -> str:
    if model.fixed_tokens is not None:
        return f"{model.fixed_tokens} tokens in every row"
    return "any number of tokens" if model.max_tokens is None else f"{model.max_tokens} tokens"


def _contract(manifest: Manifest) -> dict[str, str]:
    if manifest.contract is None:
        return {}
    held_out = manifest.contract.held_out
    return {"contract": f"{manifest.contract.asked}, judged on {held_out.kind}, {held_out.tokens} held-out tokens"}


def _kv_cache(manifest: Manifest) -> dict[str, str]:
    if manifest.model.kind != "decoder":
        return {}
    scales = ", one scale for each token and head" if manifest.kv_dtype == "int8" else ""
    return {"KV cache": f"{manifest.kv_dtype}{scales}"}


def _vocabulary(model: ModelInfo) -> dict[str, str]:
    if model.vocab_size is None:
        return {}
    ends = f"; a text ends at {_join(model.eos_token_ids) or 'no id'}" if model.kind == "decoder" else ""
    return {"vocabulary": f"{model.vocab_size} ids{ends}"}


def _join(values: Any) -> str:
    return " ".join(str(value) for value in values)
