"""Folders of sentence-transformers: the vectors that the library gives for the same folder, or a refusal by name."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, Normalize, Pooling
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForMaskedLM, AutoTokenizer

import iceformer
from iceformer.cli import main
from iceformer.deploy.session import Session
from iceformer.model.encoder import Encoder

from .folders import drop_fields, edit_json, read_json, write_json
from .sentence_folders import (
    TEXTS,
    WORDS,
    backbone,
    convert,
    embedder,
    library,
    outputs_of,
    same_direction,
    settings_of,
    tokens_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WIDTH = 48
PAIRS = [("small foxes", "the stars"), ("Small Foxes", "the stars at night " * 20)]


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


class TestSession:
    """Everything at once, in one artifact."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        torch.manual_seed(0)
        steps = (Pooling(WIDTH, ("mean", "cls"), include_prompt=False), Dense(2 * WIDTH, 24), Normalize())
        return embedder(
            tmp_path_factory.mktemp("session") / "source",
            *steps,
            options={"max_seq_length": 12},
            prompts={"query": "query : ", "story": "the stars at night"},
            default_prompt_name="story",
            truncate_dim=16,
        )

    @pytest.fixture(scope="class")
    def session(self, source: Path) -> Session:
        options: dict[str, Any] = {"buckets": (16,), "batch": 2, "attention": iceformer.Exact()}
        return iceformer.load(iceformer.compile(convert(source), source.parent / "artifact", **options))

    @pytest.mark.parametrize(
        ("options", "theirs"),
        [
            ({}, {}),
            ({"prompt": ""}, {"prompt": ""}),
            ({"prompt": "count : "}, {"prompt": "count : "}),
            ({"prompt_name": "story"}, {"prompt_name": "story"}),
            ({"prompt_name": "query"}, "encode_query"),
            ({"prompt_name": "document"}, "encode_document"),
            ({"truncate_dim": 5}, {"truncate_dim": 5}),
            ({"truncate_dim": 1000}, {"truncate_dim": 1000}),
        ],
    )
    def test_vectors(self, source: Path, session: Session, options: dict[str, Any], theirs: Any) -> None:
        model = library(source)
        for inputs in (TEXTS, PAIRS):
            call = getattr(model, theirs) if isinstance(theirs, str) else model.encode
            expected = call(inputs, **(theirs if isinstance(theirs, dict) else {}))
            encodings = session.encode(inputs, **options)
            same_direction(np.array([encoding.pooled for encoding in encodings]), expected)

    def test_prompt_goes_before_prompt_name(self, session: Session) -> None:
        with pytest.warns(UserWarning, match="prompt_name 'query' has no effect together with prompt"):
            both = session.encode("foxes", prompt="count ", prompt_name="query")
        np.testing.assert_array_equal(both.ids, session.encode("foxes", prompt="count ").ids)

    def test_texts_are_cut_or_refused(self, session: Session) -> None:
        cut, whole = session.encode([TEXTS[-1], TEXTS[0]])
        assert (cut.tokens, cut.truncated, whole.truncated) == (12, True, False)
        with pytest.raises(ValueError, match="input 1 is longer than the 12 tokens of the model's max_seq_length"):
            session.encode([TEXTS[0], TEXTS[-1]], truncate=False)

    @pytest.mark.parametrize(
        ("inputs", "options", "message"),
        [
            ("foxes", {"prompt_name": "x"}, "prompt_name is 'x', but the model's prompts are: query, document, story"),
            (
                [5, 6],
                {"prompt_name": "story"},
                "the input is list of shape .* but a prompt only goes before texts",
            ),
            ("foxes", {"truncate_dim": 0}, "truncate_dim is 0, expected a whole number above 0"),
        ],
    )
    def test_refuses(self, session: Session, inputs: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            session.encode(inputs, **options)

    def test_ids_are_taken_as_they_are(self, session: Session) -> None:
        assert session.encode([2, 5, 3]).tokens == 3

    def test_the_command(self, session: Session, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        artifact = str(source.parent / "artifact")

        def run(*arguments: str) -> tuple[Any, str]:
            with pytest.raises(SystemExit) as ended:
                main([arguments[0], artifact, *arguments[1:]])
            return ended.value.code, " ".join("".join(capsys.readouterr()).split())

        code, text = run("encode", TEXTS[-1], "--prompt-name", "query", "--truncate-dim", "5", "--json")
        expected = session.encode(TEXTS[-1], prompt_name="query", truncate_dim=5).pooled
        assert expected is not None
        assert code in (0, None)
        assert text.startswith("1 of 1 texts truncated at 12 tokens {") or text.endswith(
            "1 of 1 texts truncated at 12 tokens"
        )
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])["encodings"][0]["pooled"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert "is longer than the 12 tokens" in run("encode", TEXTS[-1], "--no-truncate")[1]
        assert "prompts are: query, document, story" in run("encode", "a", "--prompt-name", "x")[1]
        card = (source.parent / "artifact" / "README.md").read_text()
        for line in (
            "- embedding: pooling by mean and cls, without the prompt, dense 96 to 24, Tanh, length 1; "
            "16 of 24 numbers, to compare by cosine",
            '- prompts: query "query : ", document "", story (default) "the stars at night"',
            "- texts: cut at 12 tokens",
        ):
            assert line in card
        assert "cut at 12 tokens" in run("inspect")[1]


@pytest.mark.parametrize(
    "modules",
    [
        [Pooling(WIDTH, "cls"), Normalize(), Dense(WIDTH, 7, bias=False, activation_function=torch.nn.Identity())],
        [Pooling(WIDTH, "max"), Dropout(0.5), Dense(WIDTH, 9), Dense(9, 6, activation_function=torch.nn.GELU())],
        [Pooling(WIDTH, ["lasttoken", "weightedmean", "mean_sqrt_len_tokens"]), Normalize()],
    ],
)
def test_modules_behind_the_transformer(tmp_path: Path, modules: list[Any]) -> None:
    source = embedder(tmp_path / "source", *modules)
    same_embedding(convert(source), source)


def move(source: Path, path: str, to: str) -> None:
    """Moves a module's folder to another path, which modules.json then has."""
    (source / to).parent.mkdir(parents=True, exist_ok=True)
    (source / path).rename(source / to)
    modules = [{**module, "path": to if module["path"] == path else module["path"]} for module in modules_of(source)]
    write_json(source / "modules.json", modules)


def modules_of(source: Path) -> list[dict[str, Any]]:
    return read_json(source / "modules.json")


def edit_module(source: Path, index: int, **fields: Any) -> None:
    modules = modules_of(source)
    modules[index] |= fields
    write_json(source / "modules.json", modules)


def into_folder(source: Path) -> None:
    """The transformer in a folder of its own, as the first versions of the library saved it."""
    (source / "0_Transformer").mkdir()
    for file in [file for file in source.iterdir() if file.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(source / "0_Transformer" / file.name)
    edit_module(source, 0, path="0_Transformer")


def by_link(source: Path) -> None:
    (source / "2_Dense").rename(source.parent / "elsewhere")
    (source / "2_Dense").symlink_to(source.parent / "elsewhere", target_is_directory=True)


def pickled(source: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(source / "2_Dense" / "model.safetensors")
    torch.save(tensors, source / "2_Dense" / "pytorch_model.bin")
    (source / "2_Dense" / "model.safetensors").unlink()


def older_pooling(**switches: bool) -> Callable[[Path], None]:
    names = {"word_embedding_dimension": WIDTH, **{f"pooling_mode_{name}": on for name, on in switches.items()}}
    return lambda source: write_json(source / "1_Pooling" / "config.json", names)


@pytest.mark.parametrize(
    "change",
    [
        by_link,
        pickled,
        lambda source: move(source, "1_Pooling", "parts/the pooling"),
        lambda source: move(source, "2_Dense", "1_Pooling/inside"),
        lambda source: edit_module(source, 1, path="./1_Pooling/"),
        lambda source: edit_module(source, 1, type="sentence_transformers.models.Pooling"),
        lambda source: edit_module(source, 2, type="sentence_transformers.models.Dense.Dense"),
        lambda source: edit_json(source / "2_Dense" / "config.json", activation_function="torch.nn.ReLU"),
        lambda source: drop_fields(source / "2_Dense" / "config.json", "activation_function", "bias"),
        older_pooling(cls_token=True, mean_tokens=False),
        older_pooling(mean_tokens=False, max_tokens=False),
    ],
)
def test_parts_of_any_name_in_any_place(tmp_path: Path, spare: Path, change: Callable[[Path], None]) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    change(source)
    same_embedding(convert(source), source)


def same_embedding(checkpoint: Path, source: Path) -> None:
    """What stands behind the transformer, of random hidden states."""
    hidden = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)
    features: dict[str, Any] = {"token_embeddings": torch.tensor(hidden), "attention_mask": torch.ones(2, 5)}
    features["attention_mask"][1, 3:] = 0
    for module in list(library(source))[1:]:
        features = module.eval()(features)
    model = iceformer.load_model(checkpoint)
    assert isinstance(model, Encoder)
    assert model.sentence_embedding is not None
    found = model.sentence_embedding(jnp.asarray(hidden), jnp.array([5, 3]))
    same_direction(np.asarray(found), features["sentence_embedding"].detach().numpy())


def test_the_transformer_in_a_folder(tmp_path: Path, spare: Path) -> None:
    """With its tokenizer."""
    source = shutil.copytree(spare, tmp_path / "source")
    into_folder(source)
    same_direction(outputs_of(convert(source), TEXTS)["pooled"], library(source).encode(TEXTS))


def test_older_switches_are_concatenated_in_the_librarys_order(tmp_path: Path, spare: Path) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    write_json(source / "modules.json", modules_of(source)[:2])
    older_pooling(lasttoken=True, mean_tokens=True, cls_token=True)(source)
    checkpoint = convert(source)
    embedding = settings_of(checkpoint).embedding
    assert embedding is not None
    assert embedding.modes == ("cls", "mean", "lasttoken")
    same_embedding(checkpoint, source)


def test_a_bare_name_is_the_librarys_module(tmp_path: Path, spare: Path) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    for index, kind in enumerate(("Transformer", "Pooling", "Dense")):
        edit_module(source, index, type=kind)
    same_embedding(convert(source), spare)


@pytest.mark.filterwarnings("ignore:.*holds heads")
def test_heads_are_left_out(tmp_path: Path) -> None:
    backbone(tmp_path / "plain", auto_class=AutoModelForMaskedLM)
    source = embedder(tmp_path / "source")
    shutil.copyfile(tmp_path / "plain" / "model.safetensors", source / "model.safetensors")
    edit_json(source / "config.json", architectures=["BertForMaskedLM"])
    outputs = outputs_of(convert(source), TEXTS)
    assert "logits" not in outputs
    same_direction(outputs["pooled"], library(source).encode(TEXTS))


def module(kind: str, package: str = "sentence_transformers.models") -> Callable[[Path], None]:
    return lambda source: edit_module(source, 1, type=f"{package}.{kind}")


def field(file: str, **fields: Any) -> Callable[[Path], None]:
    return lambda source: edit_json(source / file, **fields)


MODEL, OPTIONS = "config_sentence_transformers.json", "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((module(kind), f"the modules Transformer, {kind}, Dense, supported: Transformer, Pooling") for kind in (
            "CNN", "LSTM", "BoW", "WordEmbeddings", "WeightedLayerPooling", "LayerNorm", "Router", "Asym",
        )),
        (module("SpladePooling", "sentence_transformers.sparse_encoder.models"), "Transformer, SpladePooling"),
        (module("Pooling", "custom_code"), "custom_code.Pooling, which is custom code of the model and is never run"),
        *((lambda source, kind=kind: edit_module(source, 0, type=kind), f"the modules {kind}, Pooling") for kind in (
            "CLIPModel", "StaticEmbedding", "MLMTransformer",
        )),
        *((lambda source, path=path: edit_module(source, 2, path=path), "a folder inside the model's") for path in (
            "../elsewhere", "/elsewhere", "2_Dense/../../elsewhere", "..\\elsewhere", "C:/elsewhere",
        )),
        (lambda source: edit_module(source, 2, path="3_Dense"), "3_Dense/config.json is missing"),
        (lambda source: edit_module(source, 1, path=None), "expected a list of modules with type and path"),
        (lambda source: write_json(source / "modules.json", {}), "expected a list of modules"),
        (lambda source: write_json(source / "modules.json", []), "has the modules of an empty list"),
        (lambda source: write_json(source / "modules.json", modules_of(source)[:1]), "the modules Transformer, "),
        (lambda source: write_json(source / "modules.json", modules_of(source)[:2] * 2), "Pooling, Transformer"),
        (field("1_Pooling/config.json", pooling_mode="median"), r"1_Pooling/config.json: the pooling is \['median'\]"),
        (field("1_Pooling/config.json", pooling_mode=[]), r"the pooling is \[\]"),
        (field("1_Pooling/config.json", include_prompt="no"), "include_prompt is 'no', expected true or false"),
        (field("1_Pooling/config.json", weights=[1]), "weights is not known"),
        (field("2_Dense/config.json", in_features=7), "in_features 7, but is given 48 numbers"),
        (field("2_Dense/config.json", out_features=7), "2_Dense: the tensors do not fit the config"),
        (field("2_Dense/config.json", bias=False), "unexpected: linear.bias"),
        (field("2_Dense/config.json", activation_function="my.Tanh"), "the activation is 'my.Tanh', supported"),
        (field("2_Dense/config.json", activation_function="torch.nn.Softmax"), "the activation is 'torch.nn.Softmax'"),
        (field("2_Dense/config.json", module_input_name="token_embeddings"), "module_input_name is 'token_embeddings'"),
        (field("2_Dense/config.json", use_residual=True), "use_residual is True, supported: false"),
        (field(MODEL, model_type="SparseEncoder"), "model_type is 'SparseEncoder', supported: SentenceTransformer"),
        (field(MODEL, default_prompt_name="x"), "default_prompt_name is 'x', expected one of: query, document"),
        (field(MODEL, prompts=["a"]), r"prompts is \['a'\], expected texts by name"),
        (field(MODEL, model_type=["SparseEncoder"]), "supported: SentenceTransformer, CrossEncoder"),
        (field(MODEL, default_prompt_name=["query"]), r"default_prompt_name is \['query'\]"),
        (field(MODEL, prompts={"query": "\ud800"}), "expected texts by name"),
        (field(MODEL, prompts={"query": 3}), "expected texts by name"),
        (field(MODEL, truncate_dim="16"), "truncate_dim is '16', expected a whole number"),
        (field(OPTIONS, max_seq_length="long"), "max_seq_length is 'long', expected a whole number"),
        (field(OPTIONS, max_seq_length=0), "max_seq_length is 0"),
        (field(OPTIONS, do_lower_case="yes"), "do_lower_case is 'yes', expected true or false"),
        (field(OPTIONS, query_length=8), "query_length is 8, supported: null"),
        (field(OPTIONS, processing_kwargs={"text": {"padding": "max_length"}}), "processing_kwargs is"),
        (field(OPTIONS, transformer_task="fill-mask"), "transformer_task is 'fill-mask', supported: "),
        (field(OPTIONS, model_args={"rotary_scaling_factor": 2}), "model_args is {'rotary_scaling_factor': 2}"),
        (field(OPTIONS, modality_config={"message": {"method": "forward"}}), "supported: only text"),
        (field(OPTIONS, surprise=1), "surprise is not known"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, spare: Path, change: Callable[[Path], None], message: str) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    change(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert len(str(caught.value)) < 1500


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder with a dense layer. Not to be changed: copy it first."""
    torch.manual_seed(0)
    return embedder(tmp_path_factory.mktemp("spare") / "source", Pooling(WIDTH), Dense(WIDTH, 5))


def test_fields_that_the_library_does_not_read_are_warned_of(tmp_path: Path, spare: Path) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    edit_json(source / MODEL, skiplist_words=["the"])
    with pytest.warns(UserWarning, match="config_sentence_transformers.json has skiplist_words, which"):
        convert(source)


@pytest.mark.parametrize("lone", [OPTIONS, MODEL, "sentence_roberta_config.json"])
def test_without_modules_json_it_is_a_plain_model_and_said(tmp_path: Path, spare: Path, lone: str) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    for name in {OPTIONS, MODEL, "modules.json"} - {lone}:
        (source / name).unlink()
    write_json(source / lone, {})
    with pytest.warns(UserWarning, match=rf"{lone} but no modules.json: .* the mean over its tokens"):
        settings = settings_of(convert(source))
    assert (settings.embedding, settings.max_seq_length, settings.prompts) == (None, None, {})


@pytest.mark.parametrize(
    ("options", "tokenizer", "config"),
    [
        ({}, {}, {}),
        ({"max_seq_length": 7}, {}, {}),
        ({"max_seq_length": None}, {"model_max_length": 9}, {}),
        ({}, {"model_max_length": 10**30}, {}),
        ({}, {"model_max_length": None}, {"max_position_embeddings": 256}),
        ({"tokenizer_args": {"model_max_length": 6}, "max_seq_length": 7}, {}, {}),
    ],
)
def test_texts_are_cut_where_the_library_cuts(
    tmp_path: Path, spare: Path, options: dict[str, Any], tokenizer: dict[str, Any], config: dict[str, Any]
) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    for file, fields in ((OPTIONS, options), ("tokenizer_config.json", tokenizer), ("config.json", config)):
        edit_json(source / file, **fields)
    assert settings_of(convert(source)).max_seq_length == library(source).max_seq_length


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_sides_and_pairs_lose_tokens_as_in_the_library(tmp_path: Path, spare: Path, side: str) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    edit_json(source / OPTIONS, max_seq_length=9)
    edit_json(source / "tokenizer_config.json", truncation_side=side)
    checkpoint, model = convert(source), library(source)
    for texts in (*((text,) for text in TEXTS), *PAIRS, ("the stars " * 9, "small foxes " * 4)):
        expected = model.preprocess([texts if len(texts) > 1 else texts[0]])["input_ids"][0].tolist()
        assert tokens_of(checkpoint, *texts).ids.tolist() == expected


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        normalizers.Strip(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()]),
        normalizers.BertNormalizer(lowercase=False),
    ],
)
def test_lower_case_as_in_the_library(tmp_path: Path, spare: Path, normalizer: Any) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizer
    tokenizer.save(str(source / "tokenizer.json"))
    edit_json(source / OPTIONS, do_lower_case=True)
    checkpoint, model = convert(source), library(source)
    for text in ("Small FOXES", " ÁT Night [SEP] ", "[MASK]"):
        assert tokens_of(checkpoint, text).ids.tolist() == model.preprocess([text])["input_ids"][0].tolist()
    assert WORDS.index("foxes") in tokens_of(checkpoint, "FOXES").ids


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": "BertTokenizerFast"},
        {"tokenizer_class": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "DistilBertTokenizerFast"},
        {"tokenizer_class": "ElectraTokenizerFast"},
        {"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids", "attention_mask"]},
        {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_segments_only_where_the_tokenizer_gives_them(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Of a plain folder, too."""
    source = backbone(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", **fields)
    drop_fields(source / "tokenizer_config.json", *(name for name, value in fields.items() if value is None))
    checkpoint = convert(source)
    given = AutoTokenizer.from_pretrained(source)(*PAIRS[0])
    expected = given.get("token_type_ids", [0] * len(given["input_ids"]))
    found = tokens_of(checkpoint, *PAIRS[0])
    assert (found.type_ids * settings_of(checkpoint).segments).tolist() == expected


def test_prompts_of_a_folder(tmp_path: Path, spare: Path) -> None:
    source = shutil.copytree(spare, tmp_path / "source")
    edit_json(source / MODEL, prompts={"passage": "p: ", "query": None}, default_prompt_name="passage")
    settings = settings_of(convert(source))
    assert settings.prompts == library(source).prompts == {"query": "", "document": "", "passage": "p: "}
    assert (settings.default_prompt_name, settings.similarity_fn_name) == ("passage", "cosine")


@pytest.mark.slow
def test_a_decoder_is_an_embedder_like_others(tmp_path: Path) -> None:
    backbone(tmp_path / "plain", "qwen3")
    source = embedder(tmp_path / "source", Pooling(WIDTH, "lasttoken"), Normalize())
    with warnings.catch_warnings(action="ignore"):
        checkpoint = convert(source)
    same_direction(outputs_of(checkpoint, TEXTS[:2])["pooled"], library(source).encode(TEXTS[:2]))
