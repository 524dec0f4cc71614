"""An artifact whose KV cache is int8: it agrees with itself in all entries, is near to the float one, and says so."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import iceformer
from iceformer.cli import app
from iceformer.deploy import artifact as layout
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.manifest import parse_manifest
from iceformer.deploy.session import Session

from ..model.cases import DECODERS
from ..model.reference import save_random
from .conftest import CHUNK, VOCABULARY

OPTIONS: dict[str, Any] = {"attention": iceformer.Exact(), "chunk": CHUNK}


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "artifact"
    return iceformer.compile(checkpoint, path, buckets=(128,), kv_dtype="int8", **OPTIONS)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)


def random_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCABULARY, length)


def check_greedy_is_most_likely(session: Session, ids: np.ndarray) -> None:
    """What decoding writes is what scoring finds most likely, over the same int8."""
    written = session.generate(ids, max_new_tokens=8).ids
    whole = np.concatenate([ids, written])
    np.testing.assert_array_equal(session.score(whole).argmax[len(ids) - 1 : -1], written)


@pytest.mark.parametrize("length", [1, 33, 100])
def test_entries_agree(session: Session, length: int) -> None:
    check_greedy_is_most_likely(session, random_ids(length))


def test_scores_are_near_to_those_of_the_float_cache(session: Session, exact_session: Session) -> None:
    ids = random_ids(128)
    difference = np.abs(session.score(ids).logprobs - exact_session.score(ids).logprobs)
    assert 1e-5 < difference.max() < 0.2
    assert difference.mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DECODERS)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    """Sliding windows, softcaps, learned positions: near to transformers, prompts in chunks and new tokens."""
    reference = save_random(tmp_path / "source", model_type, **DECODERS[model_type].tiny)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    options = OPTIONS | {"buckets": (64,), "chunk": 16}
    rounded = iceformer.load(iceformer.compile(tmp_path / "checkpoint", tmp_path / "a", kv_dtype="int8", **options))
    ids = np.random.default_rng(4).integers(0, rounded.info.model.vocab_size, 45)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.from_numpy(ids)[None]).logits[0], -1).numpy()
    np.testing.assert_allclose(rounded.score(ids).logprobs, logprobs[np.arange(44), ids[1:]], atol=0.1)
    check_greedy_is_most_likely(rounded, ids)


@pytest.mark.slow
def test_two_stage_attention_in_pages(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = OPTIONS | {
        "attention": iceformer.TwoStage(budget=64, query_block=8, local=4, key_block=4),
        "kv_dtype": "int8",
        "buckets": (256,),
    }
    pages = iceformer.load(iceformer.compile(checkpoint, tmp_path / "pages", page=128, batch=2, **options))
    whole = iceformer.load(iceformer.compile(checkpoint, tmp_path / "whole", **options))
    ids = random_ids(200)
    np.testing.assert_allclose(pages.score(ids).logprobs, whole.score(ids).logprobs, atol=1e-5)


def test_the_portable_tier_scores_alike(artifact: Path, session: Session, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    manifest = parse_manifest((artifact / layout.MANIFEST).read_bytes())
    elsewhere = dataclasses.replace(manifest.environment, jaxlib="0.9.9")
    layout.write_manifest(tmp_path / "copy", dataclasses.replace(manifest, environment=elsewhere))
    with pytest.warns(PortableTierWarning):
        portable = iceformer.load(tmp_path / "copy")
    ids = random_ids(50)
    np.testing.assert_allclose(portable.score(ids).logprobs, session.score(ids).logprobs, atol=1e-4)


def test_size_and_description(artifact: Path, session: Session, exact_session: Session) -> None:
    info = session.info
    arrays = info.buckets[0].cache.layers[0]
    assert {name: array.dtype for name, array in arrays.items()} == {
        "key": "int8",
        "value": "int8",
        "key_scale": "float32",
        "value_scale": "float32",
    }
    head_dim = arrays["key"].shape[-1]
    ratio = exact_session.info.buckets[1].cache.size_in_bytes / info.buckets[0].cache.size_in_bytes
    assert ratio == pytest.approx(4 * head_dim / (head_dim + 4))
    error = info.kv_error
    assert error is not None
    assert error.nll is not None
    assert error.rounded_nll is not None
    assert error.greedy_agreement is not None
    assert 0 < abs(error.rounded_nll - error.nll) < 0.05
    assert error.greedy_agreement > 0.9
    card = (artifact / "README.md").read_text()
    assert f"| {error.tokens} | {error.nll:.4f} | {error.rounded_nll:.4f} |" in card
    shown = CliRunner().invoke(app, ["inspect", str(artifact)], env={"COLUMNS": "200"}).output
    for text in ("int8, one scale for each token and head", "int8 keys and values", f"{error.greedy_agreement:.2%}"):
        assert text in shown


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_dtype is 'int4', expected one of: same, int8"):
        iceformer.compile(checkpoint, tmp_path / "a", kv_dtype="int4")
