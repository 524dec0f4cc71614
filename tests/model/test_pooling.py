"""Pooling of sentence embedders against its definition row by row, and what its files may say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import iceformer
from iceformer.model.encoder import Encoder
from iceformer.model.pooling import Pooling, read_pooling

from .cases import ENCODERS
from .reference import save_random

DEFINITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cls": lambda tokens: tokens[0],
    "lasttoken": lambda tokens: tokens[-1],
    "max": lambda tokens: tokens.max(0),
    "mean": lambda tokens: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / np.sqrt(len(tokens)),
    "weightedmean": lambda tokens: np.average(tokens, axis=0, weights=np.arange(1, len(tokens) + 1)),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", DEFINITIONS)
def test_pools_each_row_without_its_padding(mode: str, normalize: bool) -> None:
    hidden = np.random.default_rng(0).standard_normal((4, 9, 6)).astype(np.float32) - 2
    lengths = np.array([9, 1, 5, 0], np.int32)
    pooled = np.asarray(Pooling(mode, normalize)(jnp.asarray(hidden), jnp.asarray(lengths)))
    assert np.isfinite(pooled).all()
    for row, length in enumerate(lengths[:3]):
        expected = DEFINITIONS[mode](hidden[row, :length].astype(np.float64))
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(pooled[row], expected, atol=1e-6)


def test_pools_bfloat16_in_float32() -> None:
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300, 8)), jnp.bfloat16)
    pooled = Pooling("mean")(hidden, jnp.array([300]))
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0], np.asarray(hidden[0], np.float64).mean(0), atol=1e-6)


OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def modules(*kinds: str, package: str = OLD) -> list[dict[str, Any]]:
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    return [{"idx": 0, "path": path, "type": f"{package}.{kind}"} for path, kind in zip(paths, kinds, strict=True)]


@pytest.mark.parametrize(
    ("listed", "config", "expected"),
    [
        (modules("Transformer", "Pooling"), MEAN, Pooling("mean")),
        (modules("Transformer", "Pooling", "Normalize"), {"pooling_mode_cls_token": True}, Pooling("cls", True)),
        (modules("Transformer", "Pooling"), {"pooling_mode_lasttoken": True, **MEAN, "pooling_mode_mean_tokens": False},
         Pooling("lasttoken")),
        (modules("Transformer", "Pooling", package=NEW), {"pooling_mode": "max"}, Pooling("max")),
        (modules("Transformer", "Pooling", package=NEW), {"pooling_mode": ["mean"]}, Pooling("mean")),
    ],
)  # fmt: skip
def test_reads_both_forms(listed: Any, config: dict[str, Any], expected: Pooling) -> None:
    assert read_pooling(listed, {"1_Pooling": config}.__getitem__) == expected


@pytest.mark.parametrize(
    ("listed", "config", "message"),
    [
        (modules("Transformer", "Pooling", "Dense", "Normalize"), MEAN, "Transformer, Pooling, Dense, Normalize"),
        (modules("Transformer", "Pooling"), {**MEAN, "pooling_mode_max_tokens": True}, r"pooling is \['max', 'mean'\]"),
        (modules("Transformer", "Pooling"), {}, r"1_Pooling/config.json: the pooling is \[\]"),
        (modules("Transformer", "Pooling"), {"pooling_mode": "median"}, r"pooling is \['median'\], supported is one"),
        (modules("Transformer", "Pooling"), {**MEAN, "include_prompt": False}, "include_prompt is false"),
        ({}, MEAN, "expected a list of modules"),
    ],
)  # fmt: skip
def test_refuses_by_name(listed: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pooling(listed, {"1_Pooling": config}.__getitem__)


def test_a_sentence_embedder_keeps_its_pooling(tmp_path: Path) -> None:
    """From the source's files through the checkpoint to what `encode` gives."""
    import transformers

    source = tmp_path / "source"
    save_random(source, "bert", auto_class=transformers.AutoModel, **ENCODERS["bert"].tiny)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(MEAN))
    (source / "modules.json").write_text(json.dumps(modules("Transformer", "Pooling", "Normalize")))
    model = iceformer.load_model(iceformer.convert_checkpoint(source, tmp_path / "checkpoint"))
    assert isinstance(model, Encoder)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 8), dtype=np.int32))
    outputs = model.encode({"input_ids": ids, "token_type_ids": jnp.zeros_like(ids)}, jnp.array([8, 3]))
    expected = np.asarray(outputs["last_hidden_state"])[1, :3].mean(0)
    np.testing.assert_allclose(outputs["pooled"][1], expected / np.linalg.norm(expected), atol=1e-6)


def test_a_module_that_is_not_supported_stops_the_conversion(tmp_path: Path) -> None:
    import transformers

    source = tmp_path / "source"
    save_random(source, "bert", auto_class=transformers.AutoModel, **ENCODERS["bert"].tiny)
    (source / "modules.json").write_text(json.dumps(modules("Transformer", "Pooling", "Dense")))
    with pytest.raises(ValueError, match=r"Dense.*without modules\.json the model is taken as it is"):
        iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
