"""A real sentence embedder, all-MiniLM-L6-v2: the vectors that its users get, from a compiled artifact."""

from pathlib import Path

import numpy as np
import pytest
import torch

import iceformer
from iceformer.deploy.session import Session

TEXTS = [
    "A small fox counts the stars at night.",
    "Stars",
    "The committee postponed its decision about the budget, because two of its members had not read the report, and "
    "asked for another meeting in the second week of the month, at which the treasurer is to present the figures of "
    "the last three years again.",
    "Un renard compte les étoiles; 狐が星を数える。",
    "",
]


@pytest.fixture(scope="module")
def session(minilm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    target = tmp_path_factory.mktemp("embedder") / "artifact"
    return iceformer.load(
        iceformer.compile(minilm_checkpoint, target, buckets=(256,), batch=2, attention=iceformer.Exact())
    )


@pytest.fixture(scope="module")
def reference(minilm: Path) -> np.ndarray:
    """transformers, the mean over each text's tokens, and length 1: what the model's card says to do."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(minilm)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean).numpy()


def test_vectors_are_those_of_transformers(session: Session, reference: np.ndarray) -> None:
    encodings = session.encode(TEXTS, outputs=("pooled",))
    vectors = np.stack([encoding.pooled for encoding in encodings if encoding.pooled is not None])
    assert vectors.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * reference).sum(1).min() >= 0.99999
    np.testing.assert_allclose(vectors, reference, atol=1e-5)


def test_a_long_text_is_cut_where_the_folder_says(session: Session) -> None:
    """At 256 tokens, of sentence_bert_config.json, not at the 128 of tokenizer.json, which pads to as many, too."""
    assert session.encode("fox").tokens == 3
    assert session.encode("fox " * 200).tokens == 202
    cut = session.encode("fox " * 300)
    assert (cut.tokens, cut.truncated) == (256, True)
    with pytest.raises(ValueError, match="the input is longer than the 256 tokens of the model's max_seq_length"):
        session.encode("fox " * 300, truncate=False)
    with pytest.raises(ValueError, match="the input has 302 tokens and the largest bucket takes 256"):
        session.encode(session.tokenize("fox " * 300))


@pytest.mark.slow
def test_int8_keeps_the_vectors_and_says_how_well(session: Session, minilm_checkpoint: Path, tmp_path: Path) -> None:
    path = iceformer.compile(
        minilm_checkpoint, tmp_path / "int8", buckets=(128,), attention=iceformer.Exact(), weights="int8"
    )
    rounded = iceformer.load(path)
    loss = rounded.info.weights.error
    assert loss is not None
    assert loss.cosine is not None
    assert loss.nll is None
    assert 0.99 < loss.cosine < 1
    text = TEXTS[2]
    before, after = session.encode(text).pooled, rounded.encode(text).pooled
    assert before is not None
    assert after is not None
    assert 0.99 < float(before @ after) < 1
    # The same, from the hidden states of the two artifacts: the loss is a mean over tokens.
    states = [each.encode(text).last_hidden_state for each in (session, rounded)]
    assert states[0] is not None
    assert states[1] is not None
    lengths = np.linalg.norm(states[0], axis=1) * np.linalg.norm(states[1], axis=1)
    assert float(np.mean((states[0] * states[1]).sum(1) / lengths)) == pytest.approx(loss.cosine, abs=0.005)
    assert "cosine of hidden states" in (path / "README.md").read_text()
