"""The benchmark: random models that every engine opens, its arithmetic, and one small run of everything."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import iceformer
from iceformer.evaluate.benchmark import Benchmark, Timing, attention_left_out, run_benchmark
from iceformer.evaluate.benchmark_report import benchmark_table, plot, summary
from iceformer.evaluate.shapes import ModelShape, write_random_model

SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=96, vocab=128)


def made_up() -> Benchmark:
    timings = [
        Timing("two_stage", 100, (2.0, 1.0, 3.0), 10),
        Timing("two_stage", 400, (8.0, 8.0, 9.0), 20),
        Timing("floor", 400, (4.0, 4.0, 4.0), 20),
        Timing("eager", 400, skipped="out of memory"),
    ]
    return Benchmark({"dtype": "float32", "threads": 2, "rounds": 3}, {"cpu": "a CPU"}, 1e6, 5000, timings)


def test_random_models_are_the_same_to_every_engine(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", SHAPE, 64, "float32")
    ids = np.random.default_rng(0).integers(0, 128, (1, 40)).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids).long()).logits
    model = iceformer.load_model(iceformer.convert_checkpoint(folder, tmp_path / "checkpoint"))
    np.testing.assert_allclose(model(jnp.asarray(ids)), theirs.detach().numpy(), atol=1e-4)
    assert SHAPE.dense_flops_per_token == 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)


def test_figures_follow_from_the_timings() -> None:
    result = made_up()
    assert result.median("two_stage", 100) == 2.0
    assert np.isnan(result.median("eager", 400))
    assert result.growth("two_stage", 100, 400) == pytest.approx(1.0)
    assert result.floor_share_of_peak(400) == pytest.approx(5000 * 400 / 4.0 / 1e6)


def test_a_result_is_read_as_it_was_saved(tmp_path: Path) -> None:
    made_up().save(tmp_path / "benchmark.json")
    assert Benchmark.load(tmp_path / "benchmark.json") == made_up()
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


def test_report_shows_what_was_skipped_and_why(tmp_path: Path) -> None:
    table = benchmark_table(made_up())
    cells = [cell for column in table.columns for cell in column.cells]
    assert "not measured: out of memory" in cells
    assert any("power 1.00" in line for line in summary(made_up()))
    plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_attention_is_left_out_only_inside(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", SHAPE, 64, "float32")
    model = iceformer.load_model(iceformer.convert_checkpoint(folder, tmp_path / "checkpoint"))
    ids = jnp.arange(10)[None]
    before = model(ids)
    with attention_left_out():
        assert jnp.abs(model(ids) - before).max() > 1e-4
    np.testing.assert_array_equal(model(ids), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engines": ["abacus"]}, "expected some of: two_stage"), ({"rounds": 1}, "expected at least 3")],
)
def test_refuses(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_benchmark(tmp_path, **options)


@pytest.mark.slow
def test_a_small_run_of_every_engine(tmp_path: Path) -> None:
    options = {"shape": SHAPE, "engines": ("two_stage", "exact", "floor", "sdpa", "eager")}
    attention = iceformer.TwoStage(budget=64)
    result = run_benchmark(tmp_path, lengths=(128,), attention=attention, **options)
    assert all(len(timing.seconds) == 3 and timing.peak_bytes > 1e7 for timing in result.timings)
    longer = run_benchmark(tmp_path, lengths=(128, 256), attention=attention, **options)
    assert longer.timings[:5] == result.timings, "what was measured is not measured again"
    assert json.loads((tmp_path / "benchmark.json").read_text())["settings"]["dtype"] == "float32"
    with pytest.raises(ValueError, match="other settings"):
        run_benchmark(tmp_path, lengths=(128,), dtype="bfloat16", **options)
