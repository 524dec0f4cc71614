"""Cross-encoders: the scores that sentence-transformers' `CrossEncoder.predict` gives for the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification

import iceformer
from iceformer.cli import main
from iceformer.deploy.session import Session

from .folders import drop_fields, edit_json, read_json, write_json
from .sentence_folders import backbone, convert, outputs_of, settings_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PAIRS = [
    ("small foxes", "the stars at night"),
    ("Small Foxes count the stars", "foxes"),
    ("the stars", "small foxes at night " * 20),
    ("night " * 40, "the stars " * 30),
]
IDENTITY = "torch.nn.modules.linear.Identity"


def cross_encoder(folder: Path, labels: int = 1, **settings: Any) -> Path:
    """Saves a random cross-encoder with sentence-transformers; the model itself comes from a folder beside it."""
    plain = folder.parent / f"plain {labels}"
    if not plain.exists():
        names = {index: f"class {index}" for index in range(labels)}
        backbone(plain, auto_class=AutoModelForSequenceClassification, num_labels=labels, id2label=names)
    CrossEncoder(str(plain), device="cpu", **settings).save_pretrained(str(folder))
    return folder


def library(folder: Path) -> CrossEncoder:
    return CrossEncoder(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of one label, and the model that it was made of beside it. Not to be changed: copy it first."""
    torch.manual_seed(0)
    return cross_encoder(tmp_path_factory.mktemp("spare") / "source")


class TestSession:
    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("session") / "source"
        return cross_encoder(folder, prompts={"ask": "query : "}, default_prompt_name="ask", max_length=20)

    @pytest.fixture(scope="class")
    def artifact(self, source: Path) -> Path:
        options: dict[str, Any] = {"buckets": (32,), "batch": 2, "attention": iceformer.Exact()}
        return iceformer.compile(convert(source), source.parent / "artifact", **options)

    @pytest.fixture(scope="class")
    def session(self, artifact: Path) -> Session:
        return iceformer.load(artifact)

    @pytest.mark.parametrize("options", [{}, {"prompt": ""}, {"prompt": "count "}, {"prompt_name": "ask"}])
    def test_scores(self, source: Path, session: Session, options: dict[str, Any]) -> None:
        expected = np.asarray(library(source).predict(PAIRS, **options))
        for pairs in (PAIRS, [list(pair) for pair in PAIRS]):
            found = [encoding.scores for encoding in session.encode(pairs, **options)]
            assert all(score is not None and score.shape == () for score in found)
            np.testing.assert_allclose(np.array(found), expected, atol=1e-5)

    def test_nothing_else_is_named_a_prompt(self, session: Session) -> None:
        with pytest.raises(ValueError, match="prompt_name is 'query', but the model's prompts are: ask"):
            session.encode(PAIRS[0], prompt_name="query")
        with pytest.raises(ValueError, match="truncate_dim is for sentence embedders"):
            session.encode(PAIRS[0], truncate_dim=3)

    def test_the_command(
        self, artifact: Path, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = np.array([encoding.scores for encoding in session.encode(PAIRS[:2])])
        (tmp_path / "pairs").write_text("\n".join("\t".join(pair) for pair in PAIRS[:2]))

        def run(*options: str) -> str:
            with pytest.raises(SystemExit):
                main(["encode", str(artifact), "--pairs", "--file", str(tmp_path / "pairs"), *options])
            return capsys.readouterr().out

        assert f"{expected[0]:8.4f}  class 0" in run()
        found = [encoding["scores"]["class 0"] for encoding in json.loads(run("--json"))["encodings"]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        run("--out", str(tmp_path / "scores.npy"))
        np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-6)
        run("--out", str(tmp_path / "scores.npz"))
        np.testing.assert_allclose(np.load(tmp_path / "scores.npz")["scores"], expected, atol=1e-6)


def mark(**fields: Any) -> Callable[[Path], None]:
    """config.json as the versions before 5 left it, without other files of the library."""

    def change(source: Path) -> None:
        for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
            (source / name).unlink()
        drop_fields(source / "config.json", "sentence_transformers")
        edit_json(source / "config.json", **fields)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda source: edit_json(source / "config_sentence_transformers.json", activation_fn=IDENTITY),
        lambda source: edit_json(source / "config_sentence_transformers.json", activation_fn=None),
        lambda source: edit_json(source / "config_sentence_transformers.json", activation_fn="torch.nn.Tanh"),
        mark(sentence_transformers={"activation_fn": IDENTITY, "version": "4.1.0"}),
        mark(sentence_transformers={"version": "5.0.0"}),
        mark(sbert_ce_default_activation_function=IDENTITY),
        mark(sbert_ce_default_activation_function="torch.nn.modules.activation.Sigmoid"),
    ],
)
def test_scores_have_the_activation_that_the_folder_names(
    tmp_path: Path, spare: Path, change: Callable[[Path], None]
) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    change(source)
    settings, model = settings_of(convert(source)), library(source)
    assert settings.score_activation == type(model.activation_fn).__name__
    assert settings.max_seq_length == model.max_seq_length


def test_scores_of_several_classes(tmp_path: Path) -> None:
    source = cross_encoder(tmp_path / "source", 3, activation_fn=torch.nn.Tanh())
    expected = library(source).predict(PAIRS)
    np.testing.assert_allclose(outputs_of(convert(source), PAIRS)["scores"], np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize(("fields", "activation"), [({}, "Sigmoid"), ({"problem_type": "regression"}, "Identity")])
def test_a_classifier_that_is_not_the_librarys_has_scores_too(
    tmp_path: Path, spare: Path, fields: dict[str, str], activation: str
) -> None:
    """And, as it is nobody's cross-encoder, its texts are not cut."""
    source = shutil.copytree(spare.parent / "plain 1", tmp_path / "source")
    edit_json(source / "config.json", **fields)
    settings = settings_of(convert(source))
    assert (settings.score_activation, settings.max_seq_length) == (activation, None)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config_sentence_transformers.json", {"activation_fn": "my.Act"}, "the activation is 'my.Act', supported"),
        ("config.json", {"sentence_transformers": 3}, "config: sentence_transformers is 3, expected an object"),
        ("config.json", {"architectures": ["BertModel"]}, "for scores, but bert is converted for features"),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
    ],
)
def test_refused_by_name(tmp_path: Path, spare: Path, file: str, fields: dict[str, Any], message: str) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    edit_json(source / file, **fields)
    with pytest.raises(ValueError, match=message):
        convert(source)


@pytest.mark.parametrize("kind", ["LogitScore", "Dense"])
def test_scores_of_other_modules_are_refused(tmp_path: Path, spare: Path, kind: str) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    modules = read_json(source / "modules.json")
    added = {"idx": 1, "name": "1", "path": f"1_{kind}", "type": f"sentence_transformers.cross_encoder.modules.{kind}"}
    write_json(source / "modules.json", [*modules, added])
    with pytest.raises(ValueError, match=rf"has the modules Transformer, {kind}, supported: Transformer"):
        convert(source)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)
