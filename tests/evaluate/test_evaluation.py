"""`iceformer evaluate` from end to end on a tiny model: results, page, resuming, refusals."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer.attention import LowRank
from iceformer.deploy.examples import Question
from iceformer.evaluate.bench import Bench, Options
from iceformer.evaluate.configuration import Configuration, with_reference
from iceformer.evaluate.evaluation import evaluate_checkpoint
from iceformer.evaluate.evaluation_report import notes, summary_rows, write_report
from iceformer.evaluate.evaluation_result import Evaluation, load_evaluation
from iceformer.evaluate.task_level import make_examples

from ..model.cases import ENCODERS
from ..model.reference import save_random
from ..test_cli import run

SMALL = iceformer.TwoStage(method="mean_pool", budget=64, query_block=16, key_block=4, sink=4, local=4)
CONFIGURATIONS = {"small": Configuration(SMALL)}
OPTIONS: dict[str, Any] = {
    "tokens": 1024,
    "windows": 2,
    "blocks": 2,
    "tasks": ("passkey",),
    "lengths": (1024,),
    "depths": 2,
    "samples": 1,
}


def evaluated(
    long_llama: Path, text: Path, output: Path, report: Any = lambda line: None, **changes: Any
) -> Evaluation:
    options = Options(**{**OPTIONS, **changes})
    return evaluate_checkpoint(long_llama, output, [text], CONFIGURATIONS, options=options, report=report)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "whole"


@pytest.fixture(scope="module")
def result(long_llama: Path, text: Path, output: Path) -> Evaluation:
    return evaluated(long_llama, text, output)


def measured(result: Evaluation) -> Any:
    """All but the seconds."""
    windows = [(window.text, window.start, window.fidelity) for window in result.windows]
    return windows, result.layers, result.answers, result.skipped


def test_levels_are_all_there(result: Evaluation, long_llama: Path, output: Path) -> None:
    assert load_evaluation(output) == result
    assert result.configurations == ["small"]
    assert [len(window.seconds[name]) for window in result.windows for name in window.seconds] == [2] * 4
    assert result.overall("small").positions == 2 * 1023
    assert result.overall("small").kl > 0.01
    assert result.by_position("small")[0].kl == pytest.approx(0, abs=1e-5), "the first keys are all attended to"
    assert {layer.configuration for layer in result.layers} == {"small"}
    assert [layer.layer for layer in result.layers] == [0, 1]
    assert all(set(np.ravel(layer.keys)) == {64} for layer in result.layers)
    assert len(result.answers) == 2 * 2 * 2
    exact = {(a.depth, a.known): a.logprob for a in result.answers if a.configuration == "exact"}
    assert exact[0, True] == exact[0, False]
    content = json.loads((output / "evaluation.json").read_text())
    assert content["figures"]["small"]["time_ratio"] == pytest.approx(result.time_ratio("small"))
    assert str(long_llama.parent) not in json.dumps(content)


def test_answers_are_those_of_the_whole_prompt(result: Evaluation, long_llama: Path, text: Path) -> None:
    """Against the model's own logits over context and question in one piece."""
    bench = Bench(long_llama, with_reference(CONFIGURATIONS), Options(**OPTIONS), None)
    bench.windows([text])
    assert bench.tokenizer is not None
    example = make_examples(bench, bench.tokenizer, ("passkey", 1024, 0))[1]
    question = Question.of(example, bench.tokenizer)
    context = bench.tokenizer.encode(example.context, add_special_tokens=True).ids
    assert context[0] == 0, "the tokenizer's <s> comes first"
    ids = np.concatenate([context, question.ids])
    for name, attention in (("exact", iceformer.Exact()), ("small", SMALL)):
        logits = np.asarray(bench.model(jnp.asarray(ids[None]), attention=attention), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        end = range(ids.size - question.answer, ids.size)
        expected = sum(logprobs[position - 1, ids[position]] for position in end)
        (found,) = [a for a in result.answers if (a.configuration, a.depth, a.known) == (name, 1, True)]
        assert found.logprob == pytest.approx(expected, abs=0.02)
        assert found.right == all(logits[position - 1].argmax() == ids[position] for position in end)


def test_goes_on_where_it_was_interrupted(result: Evaluation, long_llama: Path, text: Path, tmp_path: Path) -> None:
    stops = ["window 2 of 2: comparing", "attention: layer 1", "passkey at 1024 tokens, context 1 of 1: small", ""]
    done: list[str] = []
    for stop in stops:

        def report(line: str, stop: str = stop) -> None:
            if line == stop:
                raise KeyboardInterrupt
            done.append(line)

        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            evaluated(long_llama, text, tmp_path, report)
    found = load_evaluation(tmp_path)
    assert measured(found) == measured(result)
    for step in ("window 1 of 2: comparing", "attention: layer 0", *stops[:-1]):
        assert done.count(step) == 1, "nothing is measured twice"
    again: list[str] = []
    assert evaluated(long_llama, text, tmp_path, again.append) == found
    assert again == ["loading the checkpoint", "reading the texts"]


def test_page_is_one_file_with_every_plot(result: Evaluation, tmp_path: Path) -> None:
    page = write_report(result, tmp_path).read_text()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["attention_0.png", "by_position.png", "evaluation.html", "passkey_0.png"]
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"<script|https?://|src=\"(?!data:)", page)
    head, rows = summary_rows(result)
    assert [row[0] for row in rows] == ["exact", "small"]
    assert all(len(row) == len(head) for row in rows)
    for cell in (*head, *rows[1]):
        assert cell.replace("&", "&amp;") in page
    quiet, loud = (replace(result, windows=(replace(result.windows[0], busy=busy),)) for busy in (0.0, 0.5))
    assert notes(quiet) == []
    assert notes(loud) == [
        "something else used up to 50% of the processors, so these seconds are not the configurations' own"
    ]


def test_command(capsys: pytest.CaptureFixture[str], long_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    two_stage = "--budget 64 --query-block 16 --key-block 4 --sink 4 --local 4 --method mean_pool"
    few = "--tokens 256 --windows 1 --blocks 0 --compare wide=budget=96,method=page_bound"
    arguments = [long_llama, "--output", out, "--text", text, *two_stage.split(), *few.split()]
    code, printed, _ = run(capsys, "evaluate", *arguments)
    assert code == 0
    assert "two_stage" in printed
    assert "attention level not measured: not asked for" in printed
    assert "tasks level not measured: windows of 256 tokens are too short" in printed
    asked = load_evaluation(out).settings["configurations"]
    assert [(name, each["attention"].get("budget")) for name, each in asked.items()] == [
        ("exact", None),
        ("two_stage", 64),
        ("wide", 96),
    ]
    assert asked["wide"]["attention"]["method"]["name"] == "page_bound"
    code, _, err = run(capsys, "evaluate", *arguments, "--seed", 1)
    assert code == 1
    assert "is a run with other settings (seed was 0, is 1)" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"two_stage": Configuration()}),
        (
            "--budget 512 --weights int8 --compare half=budget=256,local=4",
            {
                "two_stage": Configuration(iceformer.TwoStage(budget=512), "int8"),
                "half": Configuration(iceformer.TwoStage(budget=256, local=4), "int8"),
            },
        ),
        (
            "--method mean_pool --compare rank=method=low_rank,method.rank=8,candidates=2 "
            "--compare kv=attention=exact,kv_dtype=int8",
            {
                "two_stage": Configuration(iceformer.TwoStage("mean_pool")),
                "rank": Configuration(iceformer.TwoStage(LowRank(rank=8), candidates=2.0)),
                "kv": Configuration(iceformer.Exact(), kv_dtype="int8"),
            },
        ),
        (
            "--weights int8 --compare short=activations=int16",
            {
                "two_stage": Configuration(weights="int8"),
                "short": Configuration(weights="int8", activations="int16"),
            },
        ),
        ("--attention exact --weights int8", {"rounded": Configuration(iceformer.Exact(), "int8")}),
        ("--attention exact --compare two=attention=two_stage", {"two": Configuration()}),
    ],
)
def test_options_make_configurations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str, expected: Any
) -> None:
    given = []

    def note(checkpoint: Path, output: Path, texts: list[Path], configurations: Any, **_: Any) -> None:
        given.append(configurations)
        raise ValueError("noted")

    monkeypatch.setattr(iceformer, "evaluate_checkpoint", note)
    code, _, err = run(capsys, "evaluate", "checkpoint", "--output", "out", "--text", "text", *options.split())
    assert (code, "noted" in err) == (1, True)
    assert given == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--tokens", "8192"], "tokens is 8192, but the model was trained for at most 4096 positions"),
        (["--tokens", "32"], "tokens is 32, expected at least 64"),
        (["--tokens", "4096", "--windows", "9"], "ask for fewer tokens or windows, or give a longer text"),
        (["--attention", "exact"], "expected at least one to compare with exact attention"),
        (["--tasks", "singing"], "task is 'singing', expected one of: passkey, needle, lines"),
        (["--task-lengths", "512"], "a task's prompts have 512 tokens, expected 1024 to 2048"),
        (["--compare", "exact=budget=512"], "a configuration has the name 'exact'"),
        (["--compare", "half"], "expected a new NAME=OPTION=VALUE"),
        (["--compare", "half=budgets=8"], "--compare half is budgets, expected one of:"),
        (["--compare", "half=budget=many"], "budget is 'many', expected a number of keys, or LEAST:MOST"),
        (["--compare", "half=attention=auto"], "attention is 'auto', expected one of: two_stage, exact"),
        (["--compare", "half=activations=int8"], "only int8 weights are multiplied with rounded activations"),
        (["--compare", "half=method=magic"], "method is 'magic', expected one of:"),
        (["--compare", "half=method.rank=8"], "name the method that it belongs to"),
        (["--compare", "half=weights=int3"], "weights is 'int3', expected one of:"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], long_llama: Path, text: Path, tmp_path: Path, changes: list[str], expected: str
) -> None:
    base = ["--output", tmp_path / "out", "--text", text]
    given = base if "--tokens" in changes else [*base, "--tokens", "2048"]
    code, _, err = run(capsys, "evaluate", long_llama, *given, *changes)
    assert code == 1
    assert expected in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_refuses_encoders(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    save_random(tmp_path / "source", "bert", auto_class=AutoModelForMaskedLM, **ENCODERS["bert"].tiny)
    checkpoint = iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    code, _, err = run(capsys, "evaluate", checkpoint, "--output", tmp_path / "out", "--text", text)
    assert code == 1
    assert "expected a decoder that predicts the next token" in " ".join(err.split())


def test_a_text_needs_a_tokenizer(long_llama: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(long_llama, tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    text = tmp_path / "story.txt"
    text.write_text("a story")
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer for"):
        evaluate_checkpoint(checkpoint, tmp_path / "out", [text], CONFIGURATIONS, options=Options(**OPTIONS))


@pytest.mark.slow
def test_without_a_tokenizer_ids_are_read_and_tasks_left_out(long_llama: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(long_llama, tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 512, 1100))
    options = Options(**{**OPTIONS, "tokens": 1024, "windows": 1})
    ids = tmp_path / "ids.npy"
    result = evaluate_checkpoint(checkpoint, tmp_path / "out", [ids], {"small": SMALL}, options=options)
    assert result.skipped == {"tasks": "the model has no tokenizer"}
    assert result.windows[0].start == 38
