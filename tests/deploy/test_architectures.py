"""From checkpoint to session, against transformers: decoders with prompts in chunks and a cache, and encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import iceformer

from ..few import few
from ..model.cases import DECODERS, ENCODERS
from ..model.reference import save_random
from ..model.test_encoder_parity import convert, expected, random_inputs, save

TOKENS, NEW = 45, 6


@pytest.mark.parametrize("model_type", few(DECODERS, ("gemma3_text",)))
def test_scores_and_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    reference = save_random(tmp_path / "source", model_type, **DECODERS[model_type].tiny)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    iceformer.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", buckets=(64,), chunk=16, attention=iceformer.Exact()
    )
    session = iceformer.load(tmp_path / "artifact")
    cache = session.info.buckets[0].cache
    assert [layer["key"].shape[2] for layer in cache.layers] == [window or 64 for window in cache.windows]
    ids = np.random.default_rng(4).integers(0, session.info.model.vocab_size, TOKENS)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.from_numpy(ids)[None]).logits[0], -1).numpy()
    expected = np.take_along_axis(logprobs[:-1], ids[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(session.score(ids).logprobs, expected, atol=2e-4)

    generated = session.generate(ids, max_new_tokens=NEW).ids
    for step, token in enumerate(generated):
        with torch.no_grad():
            row = torch.from_numpy(np.concatenate([ids, generated[:step]]))[None]
            assert token == int(reference(row).logits[0, -1].argmax())


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 5, 16, 20, 40, 60])
def test_a_layer_with_a_window_keeps_no_more_than_it_sees(window: int, tmp_path: Path) -> None:
    """Prompts of all lengths around window and chunk, and what is written after them, against transformers."""
    sizes: dict[str, Any] = DECODERS["mistral"].tiny | {"sliding_window": window, "num_hidden_layers": 2}
    reference = save_random(tmp_path / "source", "mistral", **sizes)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    iceformer.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", buckets=(64,), chunk=16, attention=iceformer.Exact(), batch=2
    )
    session = iceformer.load(tmp_path / "artifact")
    cache = session.info.buckets[0].cache
    assert cache.windows == (window, window)
    assert [layer["key"].shape[2] for layer in cache.layers] == [window, window]
    ids = np.random.default_rng(4).integers(0, session.info.model.vocab_size, 64)
    with torch.no_grad():
        logits = reference(torch.from_numpy(ids)[None]).logits[0]
    logprobs = torch.log_softmax(logits, -1).numpy()
    expected = np.take_along_axis(logprobs[:-1], ids[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(session.score(ids).logprobs, expected, atol=2e-4)
    for length in (1, 15, 16, 17, 33, 50):
        generated = session.generate(ids[:length], max_new_tokens=NEW).ids
        with torch.no_grad():
            whole = torch.from_numpy(np.concatenate([ids[:length], generated]))[None]
            chosen = reference(whole).logits[0].argmax(-1).numpy()
        np.testing.assert_array_equal(generated, chosen[length - 1 : length - 1 + len(generated)])


@pytest.mark.parametrize("model_type", few(ENCODERS, ("vit",)))
def test_encodings_equal_transformers(model_type: str, tmp_path: Path) -> None:
    """Two rows, padded to the bucket; those of images and sound have one length."""
    reference = save(tmp_path, model_type, ENCODERS[model_type].tasks[0])
    model = convert(tmp_path)
    fixed = model.config.fixed_tokens
    iceformer.compile(
        tmp_path / "checkpoint",
        tmp_path / "artifact",
        buckets=(64,) if fixed is None else None,
        batch=2,
        attention=iceformer.Exact(),
    )
    session = iceformer.load(tmp_path / "artifact")
    lengths = (TOKENS, 9) if fixed is None else (fixed,) * 2
    inputs = random_inputs(model, 2, lengths[0])
    rows = [
        {name: array[row, :length] if fixed is None else array[row] for name, array in inputs.items()}
        for row, length in enumerate(lengths)
    ]
    encodings = session.encode(rows)
    for row, length in enumerate(lengths):
        outputs = expected(reference, inputs, row, length)
        assert outputs
        for name, array in outputs.items():
            np.testing.assert_allclose(getattr(encodings[row], name), array, atol=1e-4)
