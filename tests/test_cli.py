"""The command line from end to end: what it prints, where, and its exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import iceformer
from iceformer import kernels
from iceformer.cli import main

OPTIONS = (
    "--attention two_stage --method low_rank --method-option rank=4 --budget 32 --query-block 8 --key-block 2 "
    "--sink 4 --local 4 --no-exact-last-block"
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, without colours and with single blanks."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = exit_.value.code
    assert code is None or isinstance(code, int)
    return code or 0, captured.out, re.sub(r"\x1b\[[0-9;]*m", "", captured.err)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Made by the commands themselves, in processes of their own."""
    folder = tmp_path_factory.mktemp("cli")
    commands = [
        ["convert", tiny_llama, folder / "checkpoint"],
        ["compile", folder / "checkpoint", folder / "artifact", "--buckets", "64", "--chunk", "32", *OPTIONS.split()],
    ]
    printed = ""
    for command in commands:
        arguments = [str(argument) for argument in command]
        result = subprocess.run(
            [sys.executable, "-m", "iceformer.cli", *arguments], capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        printed = result.stdout
        assert str(folder) in printed
    for word in ("bucket", "prefill", "decode", "score", "code MB", "temp MB", "compile s"):
        assert word in printed
    return folder / "artifact"


def test_compile_options_reach_the_manifest(artifact: Path) -> None:
    info = iceformer.load(artifact).info
    attention = info.buckets[0].attention
    assert info.buckets[0].attention_reason == "as asked"
    assert attention["method"]["name"] == "low_rank"
    assert attention["method"]["rank"] == 4
    assert [attention[name] for name in ("budget", "query_block", "key_block", "sink", "local")] == [32, 8, 2, 4, 4]
    assert attention["exact_last_block"] is False
    assert [bucket.capacity for bucket in info.buckets] == [64]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], iceformer.Auto()),
        (["--budget", "512"], iceformer.Auto(iceformer.TwoStage(budget=512))),
        (["--attention", "auto", "--method", "mean_pool"], iceformer.Auto(iceformer.TwoStage(method="mean_pool"))),
        (["--attention", "two_stage", "--sink", "4"], iceformer.TwoStage(sink=4)),
        (["--attention", "dense"], iceformer.Dense()),
    ],
)
def test_attention_is_auto_unless_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], expected: object
) -> None:
    given = []
    monkeypatch.setattr(iceformer, "compile", lambda *_, attention, **__: given.append(attention))
    assert run(capsys, "compile", "checkpoint", "artifact", *options)[0] == 0
    assert given == [expected]


def test_generate(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = iceformer.load(artifact).generate("the line", max_new_tokens=5).text
    (tmp_path / "prompt").write_text("the line")
    for arguments in (["the line"], ["--prompt-file", tmp_path / "prompt"]):
        code, out, _ = run(capsys, "generate", artifact, *arguments, "--max-new-tokens", 5)
        assert (code, out) == (0, f"{expected}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("the line"))
    code, out, _ = run(capsys, "generate", artifact, "-", "--max-new-tokens", 5)
    assert (code, out) == (0, f"{expected}\n")


def test_score(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = iceformer.load(artifact)
    ids = session.tokenize("the line of the record")
    score = session.score(ids)
    assert not isinstance(score, list)
    (tmp_path / "a.txt").write_text("the line of the record")
    (tmp_path / "a.json").write_text(json.dumps(ids.tolist()))
    np.save(tmp_path / "a.npy", ids)
    for name in ("a.txt", "a.json", "a.npy"):
        code, out, _ = run(capsys, "score", artifact, tmp_path / name, "--json")
        figures = json.loads(out)
        assert code == 0
        assert figures["tokens"] == len(ids)
        assert figures["mean_logprob"] == pytest.approx(score.logprobs.mean(), rel=1e-5)
        assert figures["perplexity"] == pytest.approx(np.exp(-score.logprobs.mean()), rel=1e-5)
        assert figures["agreement"] == np.mean(score.argmax[:-1] == ids[1:])
    code, out, _ = run(capsys, "score", artifact, tmp_path / "a.txt")
    assert f"perplexity  {figures['perplexity']:.4f}" in out


def test_inspect(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", artifact)
    assert code == 0
    for text in (
        "two-stage, low_rank",
        "budget 32",
        "default text",
        "as asked",
        "native/64/score.bin",
        "the machine code runs here",
    ):
        assert text in " ".join(out.split())
    code, out, _ = run(capsys, "inspect", artifact, "--json")
    assert json.loads(out)["tier"] == "native"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{nowhere}", "{new}"], "{nowhere} is not a folder"),
        (["compile", "{nowhere}", "{new}"], "{nowhere} is not a folder: expected a checkpoint"),
        (["compile", "{nowhere}", "{artifact}"], "{artifact} exists"),
        (
            ["compile", "{nowhere}", "{new}", "--attention", "dense", "--budget", "64"],
            "--budget is for --attention auto or two_stage, not for dense",
        ),
        (["compile", "{nowhere}", "{new}", "--method", "best"], "method is 'best', expected one of"),
        (["compile", "{nowhere}", "{new}", "--method-option", "rank=1"], "--method-option needs --method"),
        (["compile", "{nowhere}", "{new}", "--buckets", "4k"], "--buckets is '4k', expected integers"),
        (["inspect", "{nowhere}"], "{nowhere} is not a folder: expected an artifact"),
        (["generate", "{artifact}"], "give the prompt either as an argument"),
        (["generate", "{artifact}", ""], "the prompt is empty"),
        (["generate", "{artifact}", "--prompt-file", "{nowhere}"], "No such file"),
        (["score", "{artifact}", "{nowhere}"], "No such file"),
    ],
)
def test_known_errors_are_one_line(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"nowhere": tmp_path / "nowhere", "new": tmp_path / "new", "artifact": artifact}
    code, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.format(**places) in err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ICEFORMER_ISA": "abacus"}, "error: ICEFORMER_ISA is 'abacus', but this build and this processor have: "),
        ({"ICEFORMER_KERNELS": "/nowhere.so"}, "error: ICEFORMER_KERNELS is '/nowhere.so', but there is no such file"),
    ],
)
def test_a_wrong_choice_of_kernels_is_one_line(artifact: Path, environment: dict[str, str], message: str) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    for command in (["inspect", artifact], ["generate", artifact, "the line"]):
        result = subprocess.run(
            [sys.executable, "-m", "iceformer.cli", *map(str, command)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(message)


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['flax'] = None; from iceformer.cli import main; main(['compile', 'a', 'b'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "needs flax: pip install 'iceformer[convert]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"iceformer {iceformer.__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("convert", "compile", "generate", "score", "inspect"))
    for command in ("convert", "compile", "generate", "score", "inspect"):
        assert run(capsys, command, "--help")[0] == 0
