"""The attention level of an evaluation: what each layer's selection keeps, on the model's own queries and keys."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..attention import TwoStage
from ..deploy.text_windows import Window
from .attention_fidelity import LayerFidelity, block_size, measure_layer, sampled_blocks
from .attention_recording import RecordedLayer, record_layers
from .bench import Bench
from .evaluation_result import Evaluation
from .processes import Report

LEVEL = "attention"


def measure_layers(
    work: Path, result: Evaluation, bench: Bench, windows: Sequence[Window], report: Report
) -> Evaluation:
    """Every layer that is not there yet, over the first window of each text.

    Queries and keys are those of exact attention, in the checkpoint's own weights: configurations that differ in
    number formats only have the same figures, and the first of them is measured.
    """
    attentions = _attentions(bench)
    layers = [number for number, window in enumerate(bench.model.config.windows) if window is None]
    blocks = bench.options.blocks
    starts = sampled_blocks(list(attentions.values()), bench.options.tokens, blocks) if attentions and blocks else ()
    if not starts or not layers:
        return replace(result, skipped={**result.skipped, LEVEL: _reason(bench, attentions, layers)})
    for window in {window.text: window for window in reversed(windows)}.values():
        known = {layer.layer for layer in result.layers if (layer.text, layer.start) == (window.text, window.start)}
        missing = [layer for layer in layers if layer not in known]
        if not missing:
            continue
        report(f"attention: recording queries and keys of {window.text}")
        size = block_size(list(attentions.values()))
        for recorded in record_layers(bench.model, window.ids, starts, size, missing):
            report(f"attention: layer {recorded.layer}")
            found = [
                _layer_fidelity(bench, name, attention, recorded, starts, window)
                for name, attention in attentions.items()
            ]
            result = result.adding(layers=found)
            result.save(work)
    return result


def _attentions(bench: Bench) -> dict[str, TwoStage]:
    """The different selections, by the first configuration that has them."""
    found: dict[str, TwoStage] = {}
    for name, configuration in bench.configurations.items():
        attention = configuration.attention
        if isinstance(attention, TwoStage) and attention not in found.values():
            found[name] = attention
    return found


def _layer_fidelity(
    bench: Bench, name: str, attention: TwoStage, recorded: RecordedLayer, starts: Sequence[int], window: Window
) -> LayerFidelity:
    constants = bench.constants(name)
    figures = measure_layer(
        attention,
        recorded.mask,
        recorded.query[:, :, : attention.query_block],
        recorded.key,
        recorded.value,
        jnp.asarray(starts, jnp.int32),
        {} if constants is None else constants[recorded.layer],
    )
    tables = {key: tuple(map(tuple, np.asarray(table).tolist())) for key, table in figures._asdict().items()}
    return LayerFidelity(name, window.text, window.start, recorded.layer, tuple(starts), **tables)


def _reason(bench: Bench, attentions: dict[str, TwoStage], layers: Sequence[int]) -> str:
    if not bench.options.blocks:
        return "not asked for (blocks is 0)"
    if not attentions:
        return "no configuration selects keys"
    if not layers:
        return "every layer has a sliding window, and attends exactly"
    return f"no query block selects keys in a prompt of {bench.options.tokens} tokens"
