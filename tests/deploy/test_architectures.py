"""From checkpoint to session for every decoder: prompts in chunks and new tokens with a cache, against transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import iceformer

from ..model.cases import DECODERS
from ..model.reference import save_random

TOKENS, NEW = 45, 6


@pytest.mark.parametrize("model_type", DECODERS)
def test_scores_and_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    reference = save_random(tmp_path / "source", model_type, **DECODERS[model_type].tiny)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    iceformer.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", buckets=(64,), chunk=16, attention=iceformer.Dense()
    )
    session = iceformer.load(tmp_path / "artifact")
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
