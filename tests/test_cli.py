"""The command line from end to end: what it prints, where, and its exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import iceformer
from iceformer import kernels
from iceformer.cli import main

from .conftest import Once
from .model.cases import ENCODERS
from .model.reference import save_random

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
def artifact(once: Once, tiny_llama: Path) -> Path:
    return once("cli", partial(convert_and_compile, tiny_llama)) / "artifact"


def convert_and_compile(source: Path, folder: Path) -> None:
    """By the commands themselves, in processes of their own."""
    commands = [
        ["convert", source, folder / "checkpoint"],
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


def test_compile_options_reach_the_manifest(artifact: Path) -> None:
    info = iceformer.load(artifact).info
    attention = info.buckets[0].plan["prompt"]
    assert info.buckets[0].plan_reason == "as asked"
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
        (["--attention", "exact"], iceformer.Exact()),
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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the line\n")))
    code, out, _ = run(capsys, "generate", artifact, "-", "--max-new-tokens", 5)
    assert (code, out) == (0, f"{expected}\n")


def test_generate_stops_and_samples(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with iceformer.load(artifact) as session:
        whole = session.generate("the line", 12).text or ""
        drawn = session.generate("the line", 12, 1.5, 4, top_k=9).text
    stop = whole[len(whole) // 2 :][:2]
    code, out, _ = run(capsys, "generate", artifact, "the line", "--max-new-tokens", 12, "--stop", stop)
    assert (code, out) == (0, f"{whole[: whole.index(stop)]}\n")
    options = ("--temperature", 1.5, "--seed", 4, "--top-k", 9, "--max-new-tokens", 12)
    assert run(capsys, "generate", artifact, "the line", *options)[1] == f"{drawn}\n"
    for option, value in (("--top-p", "0"), ("--temperature", "nan"), ("--stop", "")):
        code, out, err = run(capsys, "generate", artifact, "the line", option, value)
        assert (code, out) == (1, "")
        assert "expected" in err or "empty" in err


def test_logit_bias_takes_ids_and_texts(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with iceformer.load(artifact) as session:
        (word,) = session.tokenize("the", add_special_tokens=False).tolist()
        expected = session.generate("line", 4, logit_bias={word: 1e4, 5: -3.5}).text
        assert expected != session.generate("line", 4).text
    asked = ("generate", artifact, "line", "--max-new-tokens", 4)
    for token in ("the", word):
        biases = ("--logit-bias", f"{token}:1e4", "--logit-bias", "5:-3.5")
        assert run(capsys, *asked, *biases)[:2] == (0, f"{expected}\n")


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        (["7"], "is '7', expected TOKEN:VALUE"),
        ([":7"], "is ':7', expected TOKEN:VALUE"),
        (["the:much"], "expected a number behind the last colon"),
        (["the:nan"], "expected a finite number"),
        (["the line:1"], "which is 2 tokens"),
        (["1000000:1"], "logit_bias has token id 1000000"),
        (["7:1", "7:2"], "has token 7 twice"),
    ],
)
def test_logit_bias_refuses_in_a_sentence(
    artifact: Path, capsys: pytest.CaptureFixture[str], biases: list[str], message: str
) -> None:
    for command in (["generate", artifact, "line"], ["chat", artifact]):
        options = [word for bias in biases for word in ("--logit-bias", bias)]
        code, out, err = run(capsys, *command, *options)
        assert (code, out) == (1, "")
        assert message in " ".join(err.split())


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting")
    checkpoint = iceformer.convert_checkpoint("demo/model", folder / "checkpoint")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (checkpoint / "chat_template.jinja").write_text(template)
    return iceformer.compile(checkpoint, folder / "artifact", buckets=(512,), chunk=64, attention=iceformer.Exact())


def test_chat_keeps_the_conversation(
    chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "document").write_text("line a: REGISTER_CONTENT is <12>\n" * 3)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\n/new\ntwo\n/exit\nthree\n")))
    arguments = ("--file", tmp_path / "document", "--system", "Be brief", "--max-new-tokens", 6)
    code, out, err = run(capsys, "chat", chatting, *arguments)
    assert code == 0, err
    document = (tmp_path / "document").read_text().removesuffix("\n")
    messages = [{"role": "system", "content": "Be brief"}]

    def answer(session: Any, question: str) -> str:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": session.chat(messages, 6).text})
        return f"{messages[-1]['content']}\n"

    with iceformer.load(chatting) as session:
        expected = answer(session, f"{document}\n\none") + answer(session, "two")
        del messages[1:]
        expected += answer(session, f"{document}\n\ntwo")
    assert out == expected


def test_a_kept_prefix_serves_generate_and_chat(
    chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document, kept = tmp_path / "document", tmp_path / "kept"
    document.write_text("line a: REGISTER_CONTENT is <12>\n" * 20)
    code, out, err = run(capsys, "cache", chatting, kept, "--prompt-file", document, "--chat", "--room", 64)
    assert code == 0, err
    assert out.startswith(f"cache: {kept} (")
    assert int(out.split("(")[1].split()[0]) % 64 == 0
    asked = ("--chat", "--prompt-file", document, "--max-new-tokens", 5)
    plain = run(capsys, "generate", chatting, *asked)
    assert run(capsys, "generate", chatting, *asked, "--cache", kept) == plain
    for folder, message in ((tmp_path, "lacks prefix.json"), (tmp_path / "none", "is not a folder")):
        code, out, err = run(capsys, "generate", chatting, *asked, "--cache", folder)
        assert (code, out) == (1, "")
        assert message in err
    assert "exists" in run(capsys, "cache", chatting, kept, "--prompt-file", document)[2]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "expected a number of bytes" in run(capsys, "chat", chatting, "--cache-ram", "much")[2]


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


def json_encodings(out: str) -> list[dict]:
    return json.loads(out)["encodings"]


@pytest.fixture(scope="module")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The artifact of a random BERT with the tokenizer of whole words."""
    import transformers

    def make(auto_class: str, *, files: dict[str, str] | None = None, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("encoder")
        save_random(
            folder / "source",
            "bert",
            auto_class=getattr(transformers, auto_class),
            **ENCODERS["bert"].tiny | config,
        )
        words = {word: index for index, word in enumerate(["[UNK]", "the", "line", "of", "records"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "source" / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, text in (files or {}).items():
            (folder / "source" / name).parent.mkdir(exist_ok=True)
            (folder / "source" / name).write_text(text)
        checkpoint = iceformer.convert_checkpoint(folder / "source", folder / "checkpoint")
        return iceformer.compile(checkpoint, folder / "artifact", buckets=(16,), attention=iceformer.Exact())

    return make


@pytest.fixture(scope="module")
def embedder(make_encoder: Callable[..., Path]) -> Path:
    package = "sentence_transformers.models"
    modules = [{"path": "", "type": f"{package}.Transformer"}, {"path": "1_Pooling", "type": f"{package}.Pooling"}]
    pooling = {"pooling_mode_mean_tokens": True}
    files = {"modules.json": json.dumps(modules), "1_Pooling/config.json": json.dumps(pooling)}
    return make_encoder("AutoModel", files=files)


@pytest.fixture(scope="module")
def classifier(make_encoder: Callable[..., Path]) -> Path:
    return make_encoder("AutoModelForSequenceClassification", id2label={0: "calm", 1: "glad", 2: "sad"})


class TestEncode:
    def test_embeddings(self, embedder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pooled = iceformer.load(embedder).encode("the line").pooled
        assert pooled is not None
        code, out, _ = run(capsys, "encode", embedder, "the line")
        assert code == 0
        assert f"pooled: {pooled[0]:.4f} {pooled[1]:.4f}" in out
        assert f"(48 numbers, norm {np.linalg.norm(pooled):.4f})" in out
        assert "--out FILE.npy" in out
        code, out, _ = run(capsys, "encode", embedder, "the line", "--json")
        np.testing.assert_allclose(json_encodings(out)[0]["pooled"], pooled, rtol=1e-6)

    def test_files_in_and_out(self, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        texts = ["the line", "of", "records of the line"]
        (tmp_path / "texts").write_text("\n".join(texts) + "\n")
        expected = iceformer.load(embedder).encode(texts)
        code, out, _ = run(capsys, "encode", embedder, "--file", tmp_path / "texts", "--out", tmp_path / "a.npy")
        assert (code, out) == (0, f"3 encodings: {tmp_path / 'a.npy'}\n")
        pooled = np.load(tmp_path / "a.npy")
        np.testing.assert_array_equal(pooled, np.stack([one.pooled for one in expected if one.pooled is not None]))
        assert run(capsys, "encode", embedder, "--file", tmp_path / "texts", "--out", tmp_path / "a.npz")[0] == 0
        with np.load(tmp_path / "a.npz") as arrays:
            assert set(arrays) == {"lengths", "last_hidden_state", "pooled"}
            assert arrays["lengths"].tolist() == [2, 1, 4]
            rows = np.split(arrays["last_hidden_state"], np.cumsum(arrays["lengths"])[:-1])
            np.testing.assert_array_equal(rows[2], expected[2].last_hidden_state)

    def test_arrays_in(self, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        np.savez(tmp_path / "in.npz", input_ids=np.array([[1, 2], [3, 4]]))
        code, out, _ = run(capsys, "encode", embedder, "--file", tmp_path / "in.npz", "--json")
        expected = iceformer.load(embedder).encode("of records").pooled
        assert code == 0
        assert expected is not None
        np.testing.assert_allclose(json_encodings(out)[1]["pooled"], expected, rtol=1e-6)

    def test_classes_and_pairs(
        self, classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoding = iceformer.load(classifier).encode(("the line", "of records"))
        assert encoding.logits is not None
        shares = np.exp(encoding.logits) / np.exp(encoding.logits).sum()
        code, out, _ = run(capsys, "encode", classifier, "the line\tof records", "--pairs")
        lines = out.splitlines()
        assert code == 0
        assert len(lines) == 3
        assert lines[0] == f"{shares.max():8.4f}  {encoding.label}"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the line\nof records\n")))
        code, out, _ = run(capsys, "encode", classifier, "-", "--json")
        first, second = json_encodings(out)
        assert sum(first["scores"].values()) == pytest.approx(1)
        assert second["label"] == max(second["scores"], key=second["scores"].__getitem__)

    def test_classes_of_tokens(self, make_encoder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        artifact = make_encoder("AutoModelForTokenClassification", id2label={0: "name", 1: "other"})
        labels = iceformer.load(artifact).encode("the line").label
        code, out, _ = run(capsys, "encode", artifact, "the line")
        assert code == 0
        assert [line.split()[1:] for line in out.splitlines()] == [
            [label, word] for label, word in zip(labels or [], ["the", "line"], strict=True)
        ]

    def test_inspect(self, classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "inspect", classifier)
        text = " ".join(out.split())
        for found in ("bert (encoder)", "calm, glad, sad", "attention of encoding", "native/16/encode.bin"):
            assert found in text
        assert "a text ends at" not in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give the text either as an argument"),
            (["the", "--file", "x"], "give the text either as an argument"),
            (["the", "--pairs"], "text 0 has 0 tabs, but --pairs expects two texts"),
            (["the", "--out", "a.txt"], "--out is a.txt, expected a file that ends in .npy or .npz"),
            (["the", "--out", "a.npy", "--json"], "--json cannot be combined with --out"),
            (["the " * 17], "input 0 has 17 tokens and the largest bucket takes 16"),
        ],
    )
    def test_errors(
        self, embedder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        code, out, err = run(capsys, "encode", embedder, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err

    def test_the_wrong_kind(
        self, artifact: Path, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "holds a decoder (llama): it can only score and generate" in run(capsys, "encode", artifact, "the")[2]
        (tmp_path / "text").write_text("the line")
        for command in (["generate", embedder, "the"], ["score", embedder, tmp_path / "text"]):
            assert "holds an encoder (bert): it can only encode" in run(capsys, *command)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{nowhere}", "{new}"], "{nowhere} is not a folder"),
        (["compile", "{nowhere}", "{new}"], "{nowhere} is not a folder: expected a checkpoint"),
        (["compile", "{nowhere}", "{artifact}"], "{artifact} exists"),
        (
            ["compile", "{nowhere}", "{new}", "--attention", "exact", "--budget", "64"],
            "--budget is for --attention auto or two_stage, not for exact",
        ),
        (["compile", "{nowhere}", "{new}", "--method", "best"], "method is 'best', expected one of"),
        (["compile", "{nowhere}", "{new}", "--method-option", "rank=1"], "--method-option needs --method"),
        (["compile", "{nowhere}", "{new}", "--buckets", "4k"], "--buckets is '4k', expected integers"),
        (["compile", "{nowhere}", "{new}", "--decode-option", "budget=64"], "--decode-option needs --decode selection"),
        (
            ["compile", "{nowhere}", "{new}", "--attention", "exact", "--decode", "auto"],
            "--decode auto needs --attention auto, found --attention exact",
        ),
        (
            ["compile", "{nowhere}", "{new}", "--decode", "selection", "--decode-option", "buget=64"],
            "--decode-option is buget, expected one of: method, budget",
        ),
        (
            ["compile", "{nowhere}", "{new}", "--decode", "selection", "--decode-option", "budget"],
            "--decode-option is ['budget'], expected NAME=VALUE",
        ),
        (
            ["compile", "{nowhere}", "{new}", "--decode", "selection", "--decode-option", "budget=many"],
            "--decode-option budget is 'many', expected an integer",
        ),
        (
            ["compile", "{nowhere}", "{new}", "--decode", "selection", "--decode-option", "method=best"],
            "method is 'best', expected one of",
        ),
        (
            ["compile", "{nowhere}", "{new}", "--decode", "selection", "--decode-option", "mass=2"],
            "mass is 2.0, expected a share",
        ),
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
    for command in ("convert", "compile", "generate", "score", "inspect", "serve"):
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", iceformer.Auto()),
        ("--decode auto", iceformer.Auto(decode=iceformer.DecodeSelection())),
        (
            "--decode selection --decode-option mass=0.9 --decode-option budget=2048",
            iceformer.Auto(decode=iceformer.DecodeSelection(budget=2048, mass=0.9, crossover=2048)),
        ),
        (
            "--attention exact --decode selection --decode-option method=sparq --decode-option reallocate=true",
            iceformer.Plan(iceformer.Exact(), iceformer.DecodeSelection("sparq", reallocate=True)),
        ),
    ],
)
def test_attention_of_new_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str, expected: object
) -> None:
    asked: list[object] = []

    def compile_checkpoint(*_: object, attention: object, **__: object) -> Path:
        asked.append(attention)
        return tmp_path

    monkeypatch.setattr(iceformer, "compile", compile_checkpoint)
    assert run(capsys, "compile", tmp_path / "checkpoint", tmp_path / "artifact", *options.split())[0] == 0
    assert asked == [expected]
