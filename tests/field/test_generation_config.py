"""What folders say of generating text: ids that end it, in every spelling, and settings that are not applied."""

import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import iceformer
from iceformer.convert.generation_config import _APPLIED, GENERATION_CONFIG, eos_token_ids, unapplied
from iceformer.deploy.generation_defaults import GenerationDefaults

from .folders import refused, tiny, write_json

VOCAB = 100


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose generation config names no ids. Not to be changed: copy it first."""
    source = tmp_path_factory.mktemp("llama") / "source"
    tiny(source, "llama", eos_token_id=None, bos_token_id=None)
    (source / GENERATION_CONFIG).unlink()
    return source


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, source := tmp_path / "source")
    return source


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": None}, (2, 3)),
        ({"eos_token_id": 1}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": 1}, {"eos_token_id": []}, ()),
        ({}, {"eos_token_id": 2.0}, (2,)),
        ({}, {"eos_token_id": [2.0, 3, 2]}, (2, 3)),
        ({}, {"eos_token_id": [-1, 3, VOCAB, 10**30]}, (3,)),
        ({}, None, ()),
        ({"text_config": {"eos_token_id": [1, 7]}}, None, (1, 7)),
        ({"text_config": {"eos_token_id": [1, 7]}}, {"temperature": 1.0}, (1, 7)),
        ({"eos_token_id": None, "text_config": {"eos_token_id": 7}}, None, (7,)),
        ({"eos_token_id": 3, "text_config": {"eos_token_id": 7}}, None, (3,)),
        ({"text_config": None}, None, ()),
    ],
)
def test_ids_that_end_a_text(tmp_path: Path, config: dict, generation: dict | None, expected: tuple[int, ...]) -> None:
    if generation is not None:
        write_json(tmp_path / GENERATION_CONFIG, generation)
    assert eos_token_ids(tmp_path, config, VOCAB) == expected


@pytest.mark.parametrize(
    "value", ["2", "", [None], ["2"], [2, "3"], True, [True], 2.5, [[2]], {"a": 1}, float("inf"), [float("nan")]]
)
@pytest.mark.parametrize("place", [GENERATION_CONFIG, "config.json", "config.json, text_config"])
def test_what_is_no_id_is_refused(tmp_path: Path, value: Any, place: str) -> None:
    fields = {"eos_token_id": value}
    config = {"config.json": fields, "config.json, text_config": {"text_config": fields}}.get(place, {})
    if place == GENERATION_CONFIG:
        write_json(tmp_path / GENERATION_CONFIG, fields)
    with pytest.raises(ValueError, match=rf"^{place}: eos_token_id is .*, expected a token id"):
        eos_token_ids(tmp_path, config, VOCAB)


def test_a_bad_id_is_refused_at_convert_and_at_compile(source: Path, tmp_path: Path) -> None:
    checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    write_json(source / GENERATION_CONFIG, {"eos_token_id": "2"})
    message = refused(source)
    write_json(checkpoint / GENERATION_CONFIG, {"eos_token_id": "2"})
    with pytest.raises(ValueError, match="eos_token_id") as caught:
        iceformer.compile(checkpoint, tmp_path / "artifact", buckets=(64,))
    assert str(caught.value) == message
    assert message.startswith(
        'generation_config.json: eos_token_id is "2", expected a token id, a list of them, or null'
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *[({"num_beams": 5}, True), ({"text_config": {"typical_p": 0.9}}, True), ({"num_beams": 1}, False)],
        *[({"temperature": 0.5}, False), ({"text_config": {"top_p": 0.9}}, False)],  # which are applied
    ],
)
def test_without_a_generation_config_those_of_config_json_hold(tmp_path: Path, config: dict, expected: bool) -> None:
    assert bool(unapplied(tmp_path, config, VOCAB)) == expected


def test_what_is_applied_is_what_sessions_have_defaults_for() -> None:
    assert {field.name for field in fields(GenerationDefaults)} - {"unsupported"} == _APPLIED


def test_an_encoder_has_no_such_settings(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny(source, "t5")
    write_json(source / GENERATION_CONFIG, {"num_beams": 4, "eos_token_id": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
