"""Exact or two-stage for each bucket: the decision from made-up tables, and one real measurement from end to end."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

import iceformer
from iceformer.attention import LowRank, Mask, MeanPool, Plan
from iceformer.attention.shape import AttentionShape
from iceformer.deploy import artifact as layout
from iceformer.deploy import crossover
from iceformer.deploy.card import card_text
from iceformer.deploy.crossover import (
    Choice,
    CrossoverTable,
    TimedCall,
    choose,
    crossover_of,
    decide,
    measured_lengths,
    needs_measurement,
)
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.manifest import CrossoverRow, parse_manifest
from iceformer.deploy.tables import attention_tables

from ..few import few
from .conftest import VOCABULARY

TIMED = TimedCall(AttentionShape(query_heads=4, kv_heads=2, head_dim=16), dtype="float32", batch=1, chunk=32)
TWO_STAGE = iceformer.TwoStage(method=LowRank(rank=4), budget=32, query_block=8, key_block=2, sink=4, local=4)


def rows(*ratios: float) -> tuple[CrossoverRow, ...]:
    """1000, 2000, 4000 ... keys, exact attention taking a millisecond for each 1000."""
    keys = [1000 * 2**index for index in range(len(ratios))]
    return tuple(CrossoverRow(n, n * 1e-6, n * 1e-6 * ratio) for n, ratio in zip(keys, ratios, strict=True))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((), None),
        ((2.0,), None),
        ((2.0, 1.5, 1.0), None),
        ((0.9, 0.8, 1.1), None),
        ((0.5,), 1000),
        ((0.9, 0.5), 1000),
        # Half the way between 2000 and 4000 on the scale of logarithms.
        ((2.0, 1.5, 0.5), 2830),
        ((1.5, 0.5, 0.4, 0.3), 1420),
        ((2.0, 1.0, 0.5), 2000),
        # A win that does not last counts for nothing.
        ((0.9, 1.5, 0.5), 2830),
    ],
)
def test_crossover_is_where_every_longer_measurement_is_a_win(ratios: tuple[float, ...], expected: int | None) -> None:
    assert crossover_of(rows(*ratios), 10) == expected


def test_crossover_is_rounded_up_to_query_blocks() -> None:
    assert crossover_of(rows(1.5, 0.5), 128) == 1536
    assert crossover_of((CrossoverRow(1024, 1.0, 0.5),), 128) == 1024


TABLE = CrossoverTable(rows(2.0, 1.5, 0.5, 0.25), 2830)
LARGE = iceformer.TwoStage(budget=500, query_block=8, sink=0, local=0)


@pytest.mark.parametrize(
    ("table", "capacity", "chosen", "reason"),
    [
        (None, 500, None, "exact: this bucket holds no more keys than the budget, 500"),
        (TABLE, 2830, None, "exact: two-stage is faster only from 2830 keys"),
        (TABLE, 3000, 2830, "two-stage from 2830 keys: at 4000 keys it took 0.50 of the time of exact attention"),
        (TABLE, 32000, 2830, "two-stage from 2830 keys: at 8000 keys it took 0.25 of the time of exact attention"),
        (
            CrossoverTable(rows(2.0, 1.5), None),
            32000,
            None,
            "exact: at 2000 keys two-stage took 1.50 of the time of exact attention",
        ),
    ],
)
def test_each_bucket_gets_what_is_faster(
    table: CrossoverTable | None, capacity: int, chosen: int | None, reason: str
) -> None:
    expected = Plan() if chosen is None else Plan(dataclasses.replace(LARGE, crossover=chosen))
    assert choose(LARGE, table, capacity) == Choice(expected, reason)


@pytest.mark.parametrize(
    ("budget", "chunk", "capacity", "expected"),
    [
        (1024, 2048, 16384, [3072, 6144, 12288, 16384]),
        (1024, 512, 4096, [2048, 4096]),
        (1024, 2048, 2048, [2048]),
    ],
)
def test_lengths_double_up_to_the_capacity(budget: int, chunk: int, capacity: int, expected: list[int]) -> None:
    assert list(measured_lengths(budget, chunk, capacity)) == expected


def test_nothing_is_measured_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise AssertionError("measured")

    monkeypatch.setattr(crossover, "measure", fail)
    for asked in (Plan(), Plan(LARGE)):
        choices, measured = decide(asked, (256, 1024), TIMED, fail)
        assert choices == (Choice(asked, "as asked"),) * 2
        assert measured == ()
    choices, measured = decide(iceformer.Auto(LARGE), (256, 500), TIMED, fail)
    assert [choice.plan for choice in choices] == [Plan()] * 2
    assert measured == ()
    assert needs_measurement(iceformer.Auto(LARGE), (256, 501), TIMED)
    with pytest.raises(AssertionError, match="measured"):
        decide(iceformer.Auto(LARGE), (256, 501), TIMED, lambda line: None)


def test_measures_until_two_stage_has_clearly_won_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds are made up; everything else is as it is: the calls run, the table has a row for each length."""
    race = crossover._race

    def made_up(calls: Any, offset: int, length: int) -> list[float]:
        assert length - offset == 32
        assert all(second > 0 for second in race(calls, offset, length))
        return [1.0, 100 / length]

    monkeypatch.setattr(crossover, "_race", made_up)
    table = crossover.measure(TWO_STAGE, TIMED, 1024)
    # Chunks of 32 that end at 64, 128, 256; 512 and 1024 are not looked at.
    assert [row.keys for row in table.rows] == [48, 112, 240]
    assert [row.two_stage_seconds for row in table.rows] == [1.5625, 0.78125, 0.390625]
    assert table.crossover == crossover_of(table.rows, 8)


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose buckets of 128 and 256 tokens are said to be best exact and two-stage."""
    with pytest.MonkeyPatch.context() as patch:
        measured = (CrossoverRow(100, 1e-3, 2e-3), CrossoverRow(200, 2e-3, 1e-3))
        patch.setattr(crossover, "measure", lambda *_: CrossoverTable(measured, 136))
        return iceformer.compile(
            checkpoint,
            tmp_path_factory.mktemp("mixed") / "artifact",
            buckets=(128, 256),
            attention=iceformer.Auto(TWO_STAGE),
            chunk=32,
        )


def test_manifest_card_and_tables_say_what_was_chosen(mixed: Path) -> None:
    info = parse_manifest((mixed / "manifest.json").read_bytes())
    assert [bucket.plan["prompt"]["kind"] for bucket in info.buckets] == ["exact", "two_stage"]
    assert info.buckets[1].plan["prompt"]["crossover"] == 136
    reasons = [bucket.plan_reason for bucket in info.buckets]
    assert reasons == [
        "exact: two-stage is faster only from 136 keys",
        "two-stage from 136 keys: at 200 keys it took 0.50 of the time of exact attention",
    ]
    assert [row.ratio for row in info.crossover] == [2.0, 0.5]
    assert info.provenance.calibration is not None
    card = card_text(info, "artifact")
    assert all(reason in card for reason in reasons)
    assert "| 200 | 2.0 | 1.0 | 0.50 |" in card
    chosen, computed, measured = attention_tables(info)
    assert list(computed.columns[0].cells) == ["128"] * 4 + ["256"] * 4
    assert list(computed.columns[2].cells) == ["2"] * 8
    assert list(chosen.columns[2].cells) == reasons
    assert list(measured.columns[3].cells) == ["2.00", "0.50"]


def exact_logprobs(checkpoint: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    model = iceformer.load_model(checkpoint)
    logits = jax.jit(lambda tokens: model(tokens))(jax.numpy.asarray(ids[None]))[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("tier", few(["native", "portable"], ["native"]))
def test_buckets_of_both_kinds_run_from_one_set_of_weights(
    mixed: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """The exact entries take the method's constants too, and make no use of them."""
    if tier == "portable":
        monkeypatch.setattr(layout, "differences", lambda *_: ["made up"])
    with pytest.warns(PortableTierWarning) if tier == "portable" else nullcontext():
        session = iceformer.load(mixed)
    assert any(name.startswith("attention.") for name in session.info.weights.tensors)
    rng = np.random.default_rng(0)
    # 130 tokens run in the bucket of 256, where no query block of theirs sees more keys than the crossover.
    for length in (100, 130):
        ids = rng.integers(4, VOCABULARY, length)
        np.testing.assert_allclose(session.score(ids).logprobs, exact_logprobs(checkpoint, ids), atol=1e-3)
    ids = rng.integers(4, VOCABULARY, 250)
    selected, exact = session.score(ids).logprobs, exact_logprobs(checkpoint, ids)
    np.testing.assert_allclose(selected[:136], exact[:136], atol=1e-3)
    assert np.abs(selected - exact).max() > 1e-3


@pytest.mark.slow
def test_auto_measures_and_compiles(checkpoint: Path, tmp_path: Path) -> None:
    """The whole way with the real clock: whatever was faster, manifest and table agree, and the artifact runs."""
    asked = iceformer.Auto(dataclasses.replace(TWO_STAGE, method=MeanPool()))
    path = iceformer.compile(checkpoint, tmp_path / "a", buckets=(512,), attention=asked, chunk=32)
    session = iceformer.load(path)
    info = session.info
    assert info.crossover
    assert all(row.exact_seconds > 0 and row.two_stage_seconds > 0 for row in info.crossover)
    crossing = crossover_of(info.crossover, 8)
    two_stage = crossing is not None and crossing < 512
    assert info.buckets[0].plan["prompt"]["kind"] == ("two_stage" if two_stage else "exact")
    assert info.buckets[0].plan_reason.startswith("two-stage from" if two_stage else "exact:")
    assert len(session.score(np.arange(4, 300)).argmax) == 296


def test_bidirectional_attention_is_measured_over_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query sees every key: a call takes a row from its first token on, whatever the chunk, and has no cache."""
    race, seen = crossover._race, []

    def watched(calls: Any, offset: int, length: int) -> list[float]:
        assert all(second > 0 for second in race(calls, offset, length))
        seen.append((offset, length))
        return [1.0, 2.0]

    monkeypatch.setattr(crossover, "_race", watched)
    timed = dataclasses.replace(TIMED, shape=dataclasses.replace(TIMED.shape, causal=False))
    table = crossover.measure(TWO_STAGE, timed, 300)
    assert seen == [(0, 64), (0, 128), (0, 256), (0, 300)]
    assert [row.keys for row in table.rows] == [64, 128, 256, 300]
    assert table.crossover is None


def test_a_timed_call_is_bidirectional_if_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is told to be causal sees half of it; the timed function is told what the shape says."""
    told: list[bool] = []

    def attend(attention: Any, query: Any, keys: Any, rows: Any, mask: Mask, constants: Any) -> jax.Array:
        told.append(mask.causal)
        return jax.numpy.zeros(1)

    monkeypatch.setattr(crossover, "attend", attend)
    for causal in (True, False):
        shape = dataclasses.replace(TIMED.shape, causal=causal)
        crossover.measure(TWO_STAGE, dataclasses.replace(TIMED, shape=shape), 64)
    assert set(told[: len(told) // 2]) == {True}
    assert set(told[len(told) // 2 :]) == {False}


def test_a_model_of_windows_only_is_not_measured() -> None:
    timed = dataclasses.replace(TIMED, only_exact="every layer has a sliding window")
    choices, measured = decide(iceformer.Auto(LARGE), (256, 1024), timed, lambda line: None)
    assert choices == (Choice(Plan(), "exact: every layer has a sliding window"),) * 2
    assert measured == ()
    assert not needs_measurement(iceformer.Auto(LARGE), (256, 1024), timed)
