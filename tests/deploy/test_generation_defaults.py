"""What generation_config.json asks for is in the manifest: either as a default, or named as not applied."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import iceformer
from iceformer.convert.generation_config import generation_settings
from iceformer.deploy.artifact import open_artifact
from iceformer.deploy.card import card_text
from iceformer.deploy.chat_template import read_chat_template
from iceformer.deploy.generation_defaults import GenerationDefaults, disagreements, generation_rows, read_defaults
from iceformer.deploy.generation_options import choices
from iceformer.deploy.manifest import ArtifactError, Manifest, parse_manifest
from iceformer.deploy.tables import summary_table

from ..few import few

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def read(folder: Path, **fields: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return read_defaults(generation_settings(folder, {})[1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "pad_token_id": 0, "use_cache": True}, {}),
        (SAMPLING, SAMPLING),
        ({"do_sample": True}, {"do_sample": True}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {"do_sample": True, "top_k": 0, "min_p": 0.1}),
        ({"temperature": 2, "top_k": 7.0, "max_new_tokens": 9}, {"temperature": 2.0, "top_k": 7, "max_new_tokens": 9}),
        ({"stop_strings": "a"}, {"stop_strings": ("a",)}),
        ({"stop_strings": ["a", "b"]}, {"stop_strings": ("a", "b")}),
        ({"num_beams": 4, "length_penalty": 0.5}, {"unsupported": {"num_beams": 4, "length_penalty": 0.5}}),
        ({"length_penalty": 0.5, "typical_p": 0.5, "top_h": 1}, {}),
        ({"do_sample": True, "typical_p": 0.5}, {"do_sample": True, "unsupported": {"typical_p": 0.5}}),
        (
            {"no_repeat_ngram_size": 3, "suppress_tokens": [1], "num_beams": 1},
            {"unsupported": {"no_repeat_ngram_size": 3, "suppress_tokens": [1]}},
        ),
        ({"max_new_tokens": "x", "top_k": None}, {"unsupported": {"max_new_tokens": "x"}}),
        (
            {"do_sample": True, "top_p": 1.5, "top_k": 2.5, "temperature": -1},
            {"do_sample": True, "unsupported": {"top_p": 1.5, "top_k": 2.5, "temperature": -1}},
        ),
        (
            {"do_sample": True, "top_p": 0, "min_p": 0, "temperature": 0},
            {"do_sample": True, "min_p": 0.0, "temperature": 0.0, "unsupported": {"top_p": 0}},
        ),
        ({"top_p": 0.0}, {}),
        ({"do_sample": "yes"}, {"unsupported": {"do_sample": "yes"}}),
        ({"stop_strings": [""]}, {"unsupported": {"stop_strings": [""]}}),
    ],
)
def test_reads_what_a_folder_asks_for(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read(tmp_path, **fields)
    assert dataclasses.asdict(found) == dataclasses.asdict(GenerationDefaults(**expected))
    assert not list(disagreements(found))


def test_the_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    found, reference = read(tmp_path, do_sample=True), GenerationConfig()._get_default_generation_params()
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(found, name) == reference[name]


@pytest.mark.parametrize("field", ["min_p", "repetition_penalty", "temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", few([-1, 0, 5e-324, 1e-30, 1, 1e30, 1e300], [-1, 0, 5e-324, 1e300]))
def test_sampling_takes_all_that_is_applied(tmp_path: Path, field: str, value: float) -> None:
    found = read(tmp_path, do_sample=True, **{field: value})
    sampling = choices(found, None, None, 0, {}).sampling
    assert getattr(sampling, field) == (value if field not in found.unsupported else getattr(found, field))


def test_it_is_greedy_unless_tokens_are_drawn(tmp_path: Path) -> None:
    assert read(tmp_path, temperature=0.5).effective_temperature == 0
    assert read(tmp_path, temperature=0.5, do_sample=True).effective_temperature == 0.5


@pytest.mark.parametrize(
    ("defaults", "rows"),
    [
        (None, {}),
        (GenerationDefaults(), {"generation": "greedy"}),
        (
            GenerationDefaults(True, 0.7, 20, 0.8, 0.1, 1.05, 9, ("[a]\n", "b"), {"num_beams": 4, "x": "\x1b"}),
            {
                "generation": "sampling at temperature 0.7, top_k 20, top_p 0.8, min_p 0.1, repetition_penalty 1.05, "
                "up to 9 new tokens, up to '[a]\\n' or 'b'",
                "not applied": "num_beams 4, x \\x1b (generation_config.json)",
            },
        ),
    ],
)
def test_what_people_see(defaults: GenerationDefaults | None, rows: dict[str, str]) -> None:
    assert generation_rows(defaults) == rows


@pytest.fixture(scope="module")
def chat_artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As compiled from a checkpoint with templates in every place, and with settings."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("chat") / "checkpoint")
    named = [{"name": "default", "template": "config"}, {"name": "rag", "template": "{{ messages | length }} rag"}]
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": None, "extra_special_tokens": {"image_token": "<img>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, **tokens}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<no>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.replace("\n", "\r\n").encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ eos_token }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "num_beams": 2, **SAMPLING}))
    return iceformer.compile(folder, folder.parent / "artifact", buckets=(32,), attention=iceformer.Exact(), chunk=32)


def test_the_manifest_has_them(chat_artifact: Path) -> None:
    manifest = open_artifact(chat_artifact).manifest
    assert manifest.model.generation == GenerationDefaults(**SAMPLING, unsupported={"num_beams": 2})
    assert parse_manifest(manifest.to_json()) == manifest
    assert "num_beams 2" in card_text(manifest, "x")
    assert any("num_beams 2" in str(cell) for cell in summary_table(manifest).columns[1].cells)


def test_a_checkpoint_that_says_nothing_is_greedy(exact_artifact: Path) -> None:
    assert open_artifact(exact_artifact).manifest.model.generation == GenerationDefaults()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "has -1 in model.generation.top_k, expected an integer that is not negative"),
        ({"top_p": 1.5}, r"has 1\.5 in model\.generation\.top_p, which is no value for it"),
        ({"stop_strings": [""]}, r"in model\.generation\.stop_strings, which is no value"),
        ({"do_sample": 1}, "expected true or false"),
        ({"more": 1}, "unknown field model.generation.more"),
    ],
)
def test_damage_is_named(exact_artifact: Path, fields: dict[str, Any], message: str) -> None:
    from iceformer.deploy.agreement import check_agreement

    value = json.loads((exact_artifact / "manifest.json").read_text())
    value["model"]["generation"] |= fields
    with pytest.raises(ArtifactError, match=message):
        check_agreement(parse_manifest(json.dumps(value)))


def test_an_encoder_generates_nothing(exact_artifact: Path) -> None:
    from iceformer.deploy.agreement import check_agreement

    manifest: Manifest = open_artifact(exact_artifact).manifest
    without = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, generation=None))
    with pytest.raises(ArtifactError, match="expected it of decoders alone"):
        check_agreement(without)


def test_the_template_file_comes_first(chat_artifact: Path, exact_artifact: Path) -> None:
    artifact = open_artifact(chat_artifact)
    template = read_chat_template(artifact)
    assert template is not None
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s>[user] Hi\n"
    assert template.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<img>"}
    assert read_chat_template(open_artifact(exact_artifact)) is None


@pytest.mark.parametrize(("name", "expected"), [("tool_use", "tools </s>"), ("rag", "1 rag"), ("other", None)])
def test_templates_by_name(chat_artifact: Path, name: str, expected: str | None) -> None:
    template = read_chat_template(open_artifact(chat_artifact), name)
    assert (template and template.render([{"role": "user", "content": "Hi"}])) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.json": {"chat_template": "two"}}, "one"),
        ({"chat_template.json": {"chat_template": "two"}}, "two"),
        ({"tokenizer_config.json": {"chat_template": {"default": "three"}}}, "three"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "four"}]}}, None),
        ({"tokenizer_config.json": {"chat_template": 3}, "special_tokens_map.json": []}, None),
        ({}, None),
    ],
)
def test_templates_in_other_files(
    exact_artifact: Path, tmp_path: Path, files: dict[str, Any], expected: str | None
) -> None:
    from iceformer.deploy.artifact import write_file, write_manifest

    folder = shutil.copytree(exact_artifact, tmp_path / "artifact")
    manifest = open_artifact(folder).manifest
    written = tuple(write_file(folder, name, json.dumps(content).encode()) for name, content in files.items())
    write_manifest(folder, dataclasses.replace(manifest, files=(*manifest.files, *written)))
    template = read_chat_template(open_artifact(folder))
    assert (template and template.source) == expected
