"""Folders of decoders that encode: sentence embedders, bare models and rerankers, as they come from the hub."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import iceformer
from iceformer.attention import LowRank
from iceformer.cli import main
from iceformer.deploy.encoding import Encoding
from iceformer.deploy.session import Session
from iceformer.model.decoder import CausalLM
from iceformer.model.encoder import Encoder

from ..model.test_encoder_parity import difference, encode
from .folders import drop_fields, edit_json, edit_tensors, read_json, refused, tensors_of, tiny

TEXTS = ["the line", "the record of the line of the record", "", "of it, and of the record: " * 4]
PAIRS = [("the line", "the record"), ("of it", "the line of the record, of it, and of more")]
TOLERANCE = 1e-4
PAD, END = 0, 1


def save_tokenizer(folder: Path, **settings: Any) -> None:
    """A byte-level tokenizer that ends every text, and every pair of texts, with <end>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", pair="$A <end> $B <end>", special_tokens=[("<end>", END)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", **settings
    ).save_pretrained(folder)


def save_embedder(folder: Path, model_type: str, pooling: Any = "lasttoken", **fields: Any) -> None:
    """What sentence-transformers saves of a random decoder, with `source` beneath `folder` as its own folder."""
    tiny(folder / "base", model_type, auto_class=transformers.AutoModel, **fields)
    save_tokenizer(folder / "base", padding_side="left")
    body = Transformer(str(folder / "base"))
    width = body.get_embedding_dimension()
    SentenceTransformer(modules=[body, Pooling(width, pooling_mode=pooling), Normalize()]).save(str(folder / "source"))


def arrays(encodings: list[Encoding], name: str) -> np.ndarray:
    """One output of several encodings."""
    return np.array([getattr(each, name) for each in encodings])


def converted(folder: Path) -> Encoder:
    """The encoder of the Hugging Face folder `source` in a folder."""
    model = iceformer.load_model(iceformer.convert_checkpoint(folder / "source", folder / "checkpoint"))
    assert isinstance(model, Encoder)
    return model


def pooled(folder: Path) -> np.ndarray:
    """Its vectors of the texts, in one padded call."""
    tokenizer = Tokenizer.from_file(str(folder / "source" / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, given in enumerate(rows):
        ids[row, : len(given)] = given
    return encode(converted(folder), {"input_ids": ids}, lengths)["pooled"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A tied Qwen3 that sentence-transformers saved, without "model." in its names, and its vectors of the texts."""
    folder = tmp_path_factory.mktemp("embedder")
    save_embedder(folder, "qwen3", tie_word_embeddings=True)
    assert "layers.0.mlp.up_proj.weight" in tensors_of(folder / "source")
    return folder / "source", SentenceTransformer(str(folder / "source")).encode(TEXTS)


@pytest.fixture(scope="module")
def session(embedder: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("compiled")
    checkpoint = iceformer.convert_checkpoint(embedder[0], folder / "checkpoint")
    artifact = iceformer.compile(checkpoint, folder / "artifact", buckets=(96,), batch=2, attention=iceformer.Exact())
    return iceformer.load(artifact)


def test_a_compiled_embedder(
    embedder: tuple[Path, np.ndarray], session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = session.encode(TEXTS, outputs=("pooled",))
    np.testing.assert_allclose(arrays(found, "pooled"), embedder[1], atol=1e-5)
    assert (session.info.model.kind, session.info.model.task) == ("encoder", "features")
    assert [(bucket.chunk, bucket.cache.size_in_bytes) for bucket in session.info.buckets] == [(96, 0)]
    with pytest.raises(ValueError, match=r"holds an encoder \(qwen3\): it can only encode"):
        session.generate("the line")

    artifact = session._artifact.path
    assert "session.encode(" in (artifact / "README.md").read_text()
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(text for text in TEXTS if text))
    with pytest.raises(SystemExit) as stopped:
        main(["encode", str(artifact), "--file", str(lines), "--out", str(tmp_path / "vectors.npy")])
    assert not stopped.value.code
    kept = [bool(text) for text in TEXTS]
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), embedder[1][kept], atol=1e-5)


def name_the_language_model(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"])


def with_an_output_layer(folder: Path) -> None:
    name_the_language_model(folder)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    edit_tensors(folder, {"lm_head.weight": np.ones((288, 48), np.float32)})


def without_a_class(folder: Path) -> None:
    drop_fields(folder / "config.json", "architectures")
    edit_json(folder / "config.json", tie_word_embeddings=False)


@pytest.mark.parametrize(
    "change",
    [
        name_the_language_model,
        *(pytest.param(change, marks=pytest.mark.slow) for change in (with_an_output_layer, without_a_class)),
    ],
)
def test_whatever_class_a_sentence_embedder_names(
    embedder: tuple[Path, np.ndarray], change: Callable[[Path], None], copied: Path
) -> None:
    change(copied)
    np.testing.assert_allclose(pooled(copied.parent), embedder[1], atol=1e-5)
    assert read_json(copied.parent / "checkpoint" / "config.json")["architectures"] == ["Qwen3Model"]


@pytest.mark.slow
def test_a_head_left_behind(embedder: tuple[Path, np.ndarray], copied: Path) -> None:
    edit_tensors(copied, {"score.weight": np.ones((2, 48), np.float32)})
    with pytest.warns(UserWarning, match="holds heads that a model for features does not use; they are left out"):
        np.testing.assert_allclose(pooled(copied.parent), embedder[1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "pooling", "fields"),
    [
        ("mistral", "lasttoken", {"sliding_window": 9}),
        ("qwen2", "mean", {"is_causal": False}),
        ("gemma3_text", "mean", {"use_bidirectional_attention": True, "sliding_window": 12}),
        ("gpt2", "weightedmean", {}),
        ("llama", "cls", {}),
        ("phi3", "max", {}),
    ],
)
def test_pooling_of_every_kind(model_type: str, pooling: str, fields: dict[str, Any], tmp_path: Path) -> None:
    save_embedder(tmp_path, model_type, pooling, **{"vocab_size": 288, **fields})
    # One by one: padding in front moves the positions of GPT-2 and the weights of the mean.
    expected = SentenceTransformer(str(tmp_path / "source")).encode(TEXTS, batch_size=1)
    np.testing.assert_allclose(pooled(tmp_path), expected, atol=1e-5)


@pytest.fixture
def copied(embedder: tuple[Path, np.ndarray], tmp_path: Path) -> Path:
    """A copy of the embedder's folder, to change."""
    return Path(shutil.copytree(embedder[0], tmp_path / "source"))


def test_a_bare_model_gives_hidden_states(tmp_path: Path) -> None:
    """As e5-mistral is without the files of sentence-transformers: untied, and without an output layer."""
    reference = tiny(tmp_path / "source", "mistral", auto_class=transformers.AutoModel)
    assert read_json(tmp_path / "source" / "config.json")["architectures"] == ["MistralModel"]
    assert difference(converted(tmp_path), reference) < TOLERANCE


def test_a_bare_model_that_names_no_class(tmp_path: Path) -> None:
    """The tensors decide: an output layer, of its own or tied, makes a model that writes."""
    tiny(tmp_path / "source", "llama", auto_class=transformers.AutoModel)
    drop_fields(tmp_path / "source" / "config.json", "architectures")
    with pytest.warns(UserWarning, match="names no class under architectures and the weights have no output layer"):
        assert converted(tmp_path).config.task == "features"
    edit_json(tmp_path / "source" / "config.json", tie_word_embeddings=True)
    model = iceformer.load_model(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "tied"))
    assert isinstance(model, CausalLM)


def test_what_a_base_class_leaves_out_is_said(tmp_path: Path) -> None:
    tiny(tmp_path / "source", "llama")
    edit_json(tmp_path / "source" / "config.json", architectures=["LlamaModel"], auto_map={"AutoModel": "code.Model"})
    with pytest.warns(UserWarning, match="^a") as caught:
        assert converted(tmp_path).config.task == "features"
    messages = sorted(str(warning.message) for warning in caught)
    assert messages[0].startswith(
        "architectures names LlamaModel, so the model is converted as an encoder, without its out"
    )
    assert messages[1].startswith("auto_map names code that comes with the model and is never run")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen3 with one label, whose texts end with the id of padding."""
    folder = tmp_path_factory.mktemp("reranker") / "source"
    auto_class = transformers.AutoModelForSequenceClassification
    tiny(folder, "qwen3", auto_class=auto_class, num_labels=1, pad_token_id=PAD, eos_token_id=END)
    save_tokenizer(folder)
    return folder


def test_pairs_are_scored_as_by_a_cross_encoder(reranker: Path, tmp_path: Path) -> None:
    checkpoint = iceformer.convert_checkpoint(reranker, tmp_path / "checkpoint")
    artifact = iceformer.compile(checkpoint, tmp_path / "artifact", buckets=(64,), batch=2, attention=iceformer.Exact())
    found = iceformer.load(artifact).encode(PAIRS, outputs=("logits",))
    model = CrossEncoder(str(reranker), activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(arrays(found, "logits")[:, 0], model.predict(PAIRS), atol=TOLERANCE)


@pytest.mark.slow
def test_options_of_compiling(reranker: Path, tmp_path: Path) -> None:
    """Calibrated two-stage attention, int8 weights, and the attention that is faster here."""
    checkpoint = iceformer.convert_checkpoint(reranker, tmp_path / "checkpoint")
    two_stage = iceformer.TwoStage(method=LowRank(rank=4), budget=48, query_block=8, key_block=2, sink=4, local=4)
    ids = np.random.default_rng(0).integers(2, 288, 190)

    def logits(name: str, **options: Any) -> np.ndarray:
        path = iceformer.compile(checkpoint, tmp_path / name, buckets=(64, 200), batch=2, **options)
        session = iceformer.load(path)
        assert session.info.model.labels == ("LABEL_0",)
        return arrays([session.encode(ids[:count]) for count in (190, 9)], "logits")

    exact = logits("exact", attention=iceformer.Exact())
    selecting = logits("two_stage", attention=two_stage)
    assert selecting[1] == pytest.approx(exact[1], abs=TOLERANCE)
    assert 1e-5 < abs(selecting[0] - exact[0]) < 0.5
    np.testing.assert_allclose(logits("auto", attention=iceformer.Auto(two_stage)), exact, atol=0.5)
    np.testing.assert_allclose(logits("int8", attention=iceformer.Exact(), weights="int8"), exact, atol=0.1)
    loss = json.loads((tmp_path / "int8" / "manifest.json").read_text())["weights"]["error"]
    assert 0.99 < loss["cosine"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.weight": None}, r"missing: head.out.kernel \[48, 1\]"),
        ({"score.bias": np.ones(1, np.float32)}, r"unexpected: score.bias \[1\], the config has no place for it"),
        ({"score.0.weight": np.ones((48, 48), np.float32)}, r"unexpected: score.0.weight"),
    ],
)
def test_a_head_of_another_kind_is_refused(
    reranker: Path, changes: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(reranker, tmp_path / "source"))
    edit_tensors(source, changes)
    assert re.search(message, refused(source))


def test_modules_that_are_not_supported_are_refused(copied: Path) -> None:
    modules = read_json(copied / "modules.json")
    (copied / "modules.json").write_text(json.dumps(modules[:1]))
    assert "modules.json has the modules Transformer, supported:" in refused(copied)
