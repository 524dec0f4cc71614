"""What stands beside a measured speed: records of the right length, measured once, and resumed where interrupted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import iceformer
from iceformer.evaluate import benchmark_retention as module
from iceformer.evaluate.benchmark_retention import ALL_ALONG, AT_THE_END, Kept, Retention, measure_retention

ATTENTION = iceformer.TwoStage(budget=256)


def measure(folder: Path, **changes: Any) -> Retention:
    options: dict[str, Any] = {
        "records": 1,
        "tokens": 1024,
        "earlier": Retention(),
        "report": lambda step: None,
        "save": lambda known: None,
    }
    return measure_retention(folder, ATTENTION, "float32", **{**options, **changes})


def test_without_the_demo_model_the_reason_is_given(tmp_path: Path) -> None:
    result = measure(tmp_path, model=tmp_path / "nowhere")
    assert result.lines() == [f"retention not measured: {result.missing}"]
    assert "run from a checkout" in result.brief()


@pytest.mark.parametrize("options", [{"records": 0}, {"tokens": 100}])
def test_refuses(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of at least 512 tokens"):
        measure(tmp_path, **options)


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def ask(self: Any, task: str, config: iceformer.TwoStage, records: int) -> Kept:
        if len(asked) == 1:
            asked.append(("interrupted", True))
            raise KeyboardInterrupt
        asked.append((task, config.exact_last_block))
        return Kept(task, config.exact_last_block, 1000, records, 20, 10, 9)

    monkeypatch.setattr(module._Bench, "ask", ask)
    saved: list[Retention] = []
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, save=saved.append)
    assert saved[-1].missing == "the other tasks were interrupted"
    result = measure(tmp_path, earlier=saved[-1], save=saved.append)
    assert asked == [(AT_THE_END, True), ("interrupted", True), (AT_THE_END, False), (ALL_ALONG, True)]
    assert (len(result.kept), result.missing) == (3, "")
    assert measure(tmp_path, earlier=result) == result
    assert Retention.from_dict(result.to_dict()) == result
    measure(tmp_path, earlier=replace(result, asked=(2, 1024)))
    assert len(asked) == 7, "other records are asked again"


@pytest.mark.parametrize("task", [AT_THE_END, ALL_ALONG])
def test_records_are_nearly_as_long_as_wanted(tmp_path: Path, task: str) -> None:
    tokens = 2048
    bench = module._Bench(tmp_path, module.DEMO_MODEL, "float32", tokens, lambda step: None)
    made = bench._task(task, 0)
    assert 0.9 * tokens < len(made.ids) <= tokens
    assert len(made.answers) >= (4 if task == AT_THE_END else 20)
    assert list(made.ids) != list(bench._task(task, 1).ids)
