"""Exact attention or a selection for new tokens: the decision from made-up tables, and one real measurement."""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import iceformer
from iceformer.attention import DecodeSelection, Exact, LowRank, Plan, TwoStage
from iceformer.attention.shape import AttentionShape
from iceformer.deploy import crossover, decode_crossover
from iceformer.deploy.card import card_text
from iceformer.deploy.crossover import Choice, CrossoverTable, TimedCall, crossover_of
from iceformer.deploy.decode_crossover import decide_decode, measure_decode, needs_decode_measurement
from iceformer.deploy.manifest import CrossoverRow
from iceformer.deploy.tables import attention_tables

TIMED = TimedCall(AttentionShape(query_heads=4, kv_heads=2, head_dim=16), dtype="float32", batch=1, chunk=32)
METHOD = LowRank(rank=4)
SELECTION = DecodeSelection(METHOD, budget=32, key_block=4, sink=4, local=8, exact_layers=0)
AUTO = iceformer.Auto(TwoStage(METHOD, budget=32, query_block=8, key_block=4, sink=4, local=4), SELECTION)
PROMPTS = (Choice(Plan(), "exact: made up"), Choice(Plan(AUTO.two_stage), "two-stage: made up"))


def fail(*_: object) -> NoReturn:
    raise AssertionError("measured")


@pytest.mark.parametrize(
    ("ratios", "crossover", "expected"),
    [
        (
            (1.5, 0.5),
            900,
            ("exact: a selection is faster only from 900 keys", "select from 900 keys: at 2000 it took 0.50"),
        ),
        ((0.5, 0.4), 100, ("select from 100 keys: at 1000 it took 0.50", "select from 100 keys: at 2000 it took 0.40")),
        ((3.0, 2.0), None, ("exact: at 2000 keys a selection took 2.00", "exact: at 2000 keys a selection took 2.00")),
    ],
)
def test_each_bucket_gets_what_is_faster(
    monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, ...], crossover: int | None, expected: tuple[str, ...]
) -> None:
    rows = tuple(CrossoverRow(1000 * (i + 1), 1e-3, 1e-3 * ratio) for i, ratio in enumerate(ratios))
    monkeypatch.setattr(decode_crossover, "measure_decode", lambda *_: CrossoverTable(rows, crossover))
    said: list[str] = []
    choices, measured = decide_decode(PROMPTS, AUTO, (800, 4000), TIMED, said.append)
    assert measured == rows
    assert said == ["measuring the crossover of decoding"]
    for choice, before, why in zip(choices, PROMPTS, expected, strict=True):
        assert choice.reason.startswith(f"{before.reason}; new tokens {why}")
        assert choice.plan.prompt == before.plan.prompt
        selects = why.startswith("select")
        assert choice.plan.decode == (dataclasses.replace(SELECTION, crossover=crossover or 0) if selects else Exact())


def test_nothing_is_measured_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_crossover, "measure_decode", fail)
    asked = Plan(Exact(), SELECTION)
    assert decide_decode(PROMPTS, asked, (64, 128), TIMED, fail) == (PROMPTS, ())
    assert decide_decode(PROMPTS, iceformer.Auto(), (64, 128), TIMED, fail) == (PROMPTS, ())
    windows = dataclasses.replace(TIMED, only_exact="every layer has a sliding window")
    assert decide_decode(PROMPTS, AUTO, (64, 128), windows, fail) == (PROMPTS, ())
    # The budget covers the first bucket; a selection with a crossover is taken as it is.
    choices, measured = decide_decode(PROMPTS[:1], AUTO, (32,), TIMED, fail)
    assert choices[0] == Choice(Plan(), "exact: made up; new tokens exact: this bucket holds no more than 32 keys")
    assert measured == ()
    asked = dataclasses.replace(AUTO, decode=dataclasses.replace(SELECTION, crossover=100))
    choices, _ = decide_decode(PROMPTS, asked, (64, 128), TIMED, fail)
    assert [choice.plan.decode for choice in choices] == [Exact(), asked.decode]
    assert needs_decode_measurement(AUTO, (16, 33), TIMED)
    assert not needs_decode_measurement(AUTO, (16, 32), TIMED)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_both_are_timed_over_more_memory_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch, kv_dtype: str) -> None:
    seen: list[tuple[int, int]] = []
    race = crossover._race

    def watched(calls: Any, offset: int, length: int) -> list[float]:
        seen.append((offset, length))
        return race(calls, offset, length)

    monkeypatch.setattr(crossover, "_race", watched)
    monkeypatch.setattr(decode_crossover, "_MEMORY", 2**16)
    table = measure_decode(SELECTION, dataclasses.replace(TIMED, kv_dtype=kv_dtype), 200)
    assert seen == [(63, 64), (127, 128), (199, 200)][: len(seen)]
    assert [row.keys for row in table.rows] == [length for _, length in seen]
    assert all(row.exact_seconds > 0 and row.two_stage_seconds > 0 for row in table.rows)
    assert table.crossover == crossover_of(table.rows, 1)


def test_what_was_measured_is_in_manifest_card_and_tables(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (CrossoverRow(64, 1e-5, 2e-5), CrossoverRow(128, 2e-3, 1e-3))
    monkeypatch.setattr(crossover, "measure", lambda *_: CrossoverTable(rows[:1], None))
    monkeypatch.setattr(decode_crossover, "measure_decode", lambda *_: CrossoverTable(rows, 80))
    path = iceformer.compile(checkpoint, tmp_path / "a", buckets=(32, 128), attention=AUTO, chunk=32)
    session = iceformer.load(path)
    assert session.info.decode_crossover == rows
    assert [bucket.plan["decode"]["kind"] for bucket in session.info.buckets] == ["exact", "decode_selection"]
    assert session.info.buckets[1].plan["decode"]["crossover"] == 80
    card = card_text(session.info, "a")
    assert "| 64 | 0.010 | 0.020 | 2.00 |" in card
    assert "| 128 | 2.0 | 1.0 | 0.50 |" in card
    measured = attention_tables(session.info)[-1]
    assert list(measured.columns[3].cells) == ["2.00", "0.50"]
    assert len(session.generate(np.arange(4, 100), max_new_tokens=4).ids) == 4


def test_an_encoder_writes_no_tokens(tmp_path: Path, minilm_checkpoint: Path) -> None:
    for asked in (AUTO, Plan(Exact(), SELECTION)):
        with pytest.raises(ValueError, match="an encoder writes no tokens"):
            iceformer.compile(minilm_checkpoint, tmp_path / "a", attention=asked)


def test_selections_that_do_not_fit_the_prompts_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="keep different things under one name"):
        iceformer.Auto(TwoStage(LowRank(rank=8)), DecodeSelection(LowRank(rank=16)))
