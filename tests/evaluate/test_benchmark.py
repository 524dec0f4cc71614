"""The benchmark: random models that every engine opens, its arithmetic, its report, and small runs of every engine."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import iceformer
from iceformer.attention.shape import AttentionShape
from iceformer.cli import main
from iceformer.evaluate import benchmark as benchmark_module
from iceformer.evaluate.attention_benchmark import run_attention_benchmark
from iceformer.evaluate.benchmark import run_benchmark
from iceformer.evaluate.benchmark_report import benchmark_table, plot, summary
from iceformer.evaluate.benchmark_result import Benchmark
from iceformer.evaluate.benchmark_retention import ALL_ALONG, AT_THE_END, Kept, Retention
from iceformer.evaluate.engines import ENGINES, PrefillJob, ours
from iceformer.evaluate.iceformer_engines import compile_engine
from iceformer.evaluate.processes import Timing
from iceformer.evaluate.shapes import ModelShape, write_random_model

SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=96, vocab=128)
RETENTION = Retention(
    (1, 400), (Kept(AT_THE_END, True, 390, 1, 20, 10, 9), Kept(AT_THE_END, False, 390, 1, 20, 10, 8)), "interrupted"
)


def made_up() -> Benchmark:
    timings = [
        Timing("two_stage", 100, (2.0, 1.0, 3.0), 10),
        Timing("two_stage", 400, (8.0, 8.0, 9.0), 20, difference=3.0),
        Timing("floor", 400, (4.0, 4.0, 4.0), 20, difference=3.0),
        Timing("exact", 400, (16.0, 16.0, 16.0), 20, difference=0.0),
        Timing("sdpa", 400, (20.0, 20.0, 20.0), 20, difference=1e-5),
        Timing("openvino", 400, (2.0, 2.0, 2.0), 20, difference=0.7, busy=0.5),
        Timing("eager", 400, skipped="out of memory"),
    ]
    settings = {"mode": "prefill", "model": {"layers": 2}, "dtype": "float32", "threads": 2, "rounds": 3}
    return Benchmark(settings, {"cpu": "a CPU"}, 1e6, 5000, timings, RETENTION)


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
    assert result.ratio("sdpa", "two_stage", 400) == 2.5
    figures = result.figures()
    assert figures["lengths"]["400"]["ratio_to_floor"]["two_stage"] == 2.0
    assert figures["lengths"]["400"]["tokens_per_second"]["sdpa"] == 20.0
    assert figures["lengths"]["400"]["seconds"]["eager"] is None
    assert figures["growth"]["100-400"] == {
        "two_stage": 1.0,
        **dict.fromkeys(("floor", "exact", "sdpa", "openvino", "eager")),
    }
    assert figures["agrees_with_exact"] == {"exact-400": True, "sdpa-400": True, "openvino-400": False}


def test_a_result_is_read_as_it_was_saved(tmp_path: Path) -> None:
    made_up().save(tmp_path / "benchmark.json")
    assert Benchmark.load(tmp_path / "benchmark.json") == made_up()
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [kept["retention"] for kept in content["retention"]["kept"]] == [0.9, 0.8]
    settings = made_up().settings
    assert Benchmark.load(tmp_path / "benchmark.json", settings) == made_up()
    with pytest.raises(ValueError, match=r"model\.layers was 2, is 4"):
        Benchmark.load(tmp_path / "benchmark.json", {**settings, "model": {"layers": 4}})


def test_report_says_what_stands_beside_the_seconds(tmp_path: Path) -> None:
    table = benchmark_table(made_up())
    cells = [cell for column in table.columns for cell in column.cells]
    assert "not measured" in cells
    assert "7.0e-01 !" in cells, "an engine that computes something else is marked"
    caption = str(table.caption)
    assert "eager, 400 tokens, not measured: out of memory" in caption
    assert "retention 0.900 questions at the end, 0.800 questions at the end (no exact last block)" in caption
    lines = "\n".join(summary(made_up()))
    for text in (
        "retention 0.900  questions at the end, exact last block: 9 answers right, with exact attention 10, of 20",
        "retention not measured: interrupted",
        "400 tokens: two_stage has 2.50 x the speed of SDPA, 0.25 x the speed of OpenVINO, 2.00 x the time",
        "400 tokens: exact has 1.25 x the speed of SDPA",
        "400 tokens: the dense layers run at 50% of the matrix product's peak",
        "seconds grow with the power two_stage 1.00",
        "400 tokens: openvino does not compute what exact does: its output is off by 0.7 standard deviations",
        "400 tokens: something else used 50% of the processors",
    ):
        assert text in lines
    plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_without_retention_name_the_reason() -> None:
    result = replace(made_up(), retention=Retention(missing="not asked for"))
    assert "retention not measured: not asked for" in str(benchmark_table(result).caption)
    assert "retention not measured: not asked for" in summary(result)
    longer = replace(made_up(), timings=[Timing("exact", 800, (1.0, 1.0, 1.0))])
    assert "retention at 800 tokens is not known: the records have 390" in summary(longer)


def test_our_engine_gives_the_logits_of_the_last_token(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", SHAPE, 64, "float32")
    checkpoint, artifact = tmp_path / "checkpoint", tmp_path / "exact"
    attention = iceformer.TwoStage(budget=64)
    compile_engine("exact", folder, checkpoint, artifact, length=50, attention=attention, dtype="float32")
    ids = np.arange(50, dtype=np.int32)
    job = PrefillJob(
        engine="exact", length=50, dtype="float32", threads=1, output="", source=str(folder), form=str(artifact)
    )
    engine = ours(job, ids)
    expected = iceformer.load_model(checkpoint)(jnp.asarray(ids)[None])[0, -1]
    np.testing.assert_allclose(engine.output(), expected, atol=1e-5)
    engine.run()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engines": ["abacus"]}, ValueError, "expected some of: two_stage"),
        ({"engines": []}, ValueError, "expected some of: two_stage"),
        ({"rounds": 1}, ValueError, "expected at least 3"),
        ({"engines": ["openvino"]}, ModuleNotFoundError, "openvino needs openvino: pip install"),
    ],
)
def test_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    found = benchmark_module.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark_module.importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    with pytest.raises(error, match=message):
        run_benchmark(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_attention_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "shape": AttentionShape(query_heads=4, kv_heads=2, head_dim=16),
        "attention": iceformer.TwoStage(budget=64),
        "engines": ("two_stage", "exact", "sdpa"),
    }
    steps: list[str] = []
    result = run_attention_benchmark(tmp_path, lengths=(200,), report=steps.append, **options)
    assert [timing.engine for timing in result.timings] == ["two_stage", "exact", "sdpa"]
    assert all(len(timing.seconds) == 3 and timing.peak_bytes > 1e7 for timing in result.timings)
    assert result.figures()["agrees_with_exact"] == {"exact-200": True, "sdpa-200": True}
    assert (result.timings[0].difference or 0) > 0.1, "a selection of random keys is not all of them"
    assert any("round 2 of 3, exact; about 0 s to go" in step for step in steps)
    assert result.retention.missing == "not asked for (--retention)"
    steps.clear()
    again = run_attention_benchmark(tmp_path, lengths=(200,), report=steps.append, **options)
    assert (again.timings, steps) == (result.timings, []), "what was measured is not measured again"


def test_attention_alone_in_both_directions_has_no_retention(tmp_path: Path) -> None:
    shape = AttentionShape(query_heads=2, kv_heads=2, head_dim=8, causal=False)
    with pytest.raises(ValueError, match="causal: leave out --retention"):
        run_attention_benchmark(tmp_path, shape=shape, retention=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}

    def run(work: Path, **options: Any) -> Benchmark:
        given.update(options)
        options["report"]("a step")
        return made_up()

    monkeypatch.setattr("iceformer.evaluate.attention_benchmark.run_attention_benchmark", run)
    command = ["benchmark", str(tmp_path), "--attention-only", "--bidirectional", "--heads", "8", "--kv-heads", "2"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--lengths", "512,1024", "--engines", "exact,sdpa"])
    assert not end.value.code
    assert given["shape"] == AttentionShape(8, 2, 64, causal=False)
    assert (given["lengths"], given["engines"], given["retention"]) == ((512, 1024), ["exact", "sdpa"], False)
    printed = capsys.readouterr()
    assert "0 s  a step" in printed.err
    assert "retention 0.900  questions at the end" in printed.out
    assert "onnxruntime" not in printed.out
    assert (tmp_path / "benchmark.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bidirectional"], "--bidirectional needs --attention-only"),
        (["--head-dim", "32"], "--head-dim needs --attention-only"),
        (["--attention-only", "--model", "a"], "--model cannot be combined with --attention-only"),
        (["--attention-only", "--engines", "floor"], "expected some of: two_stage, exact, sdpa, eager"),
        (["--new-tokens", "8"], "--new-tokens needs --decode"),
        (["--decode", "--attention-only"], "--decode cannot be combined with --attention-only"),
        (["--decode", "--retention"], "--retention cannot be combined with --decode"),
        (["--decode", "--lengths", "0"], "depths are [0], expected some of at least 1 token"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", str(tmp_path), *options])
    assert end.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_of_every_engine(tmp_path: Path) -> None:
    for package in ("openvino", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    options: dict[str, Any] = {
        "shape": SHAPE,
        "attention": iceformer.TwoStage(budget=64),
        "retention_records": 1,
        "retention_tokens": 1024,
    }
    first = run_benchmark(tmp_path, lengths=(128,), engines=("two_stage", "exact"), **options)
    assert [(kept.task, kept.exact_last_block) for kept in first.retention.kept] == [
        (AT_THE_END, True),
        (AT_THE_END, False),
        (ALL_ALONG, True),
    ]
    assert all(kept.exact > 0 and kept.tokens <= 1024 for kept in first.retention.kept)
    steps: list[str] = []
    result = run_benchmark(tmp_path, lengths=(128, 200), engines=tuple(ENGINES), report=steps.append, **options)
    assert result.retention == first.retention
    assert not any("retention" in step for step in steps)
    assert [timing.engine for timing in result.timings if timing.length == 128] == list(ENGINES), "all took turns again"
    assert all(len(timing.seconds) == 3 and timing.peak_bytes > 1e7 for timing in result.timings), result.timings
    agrees = result.figures()["agrees_with_exact"]
    assert set(agrees) == {f"{name}-{n}" for name in set(ENGINES) - {"two_stage", "floor"} for n in (128, 200)}
    assert all(agrees.values())
    with pytest.raises(ValueError, match="dtype was float32, is bfloat16"):
        run_benchmark(tmp_path, lengths=(128,), dtype="bfloat16", **options)


@pytest.mark.slow
def test_engines_agree_in_bfloat16_or_say_why_not(tmp_path: Path) -> None:
    for package in ("openvino", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    engines = ("exact", "sdpa", "openvino", "onnxruntime")
    result = run_benchmark(tmp_path, shape=SHAPE, lengths=(128,), engines=engines, dtype="bfloat16", retention=False)
    assert result.figures()["agrees_with_exact"] == {"exact-128": True, "sdpa-128": True, "openvino-128": True}
    (skipped,) = [timing for timing in result.timings if timing.skipped]
    assert (skipped.engine, math.isnan(skipped.median)) == ("onnxruntime", True)
    assert "no bfloat16 kernels" in skipped.skipped
