"""Sentence embeddings of all-MiniLM-L6-v2, with its real weights, against transformers on the same files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModel, AutoTokenizer

import iceformer
from iceformer.model.encoder import Encoder, mean_over_tokens

from ..few import few

SENTENCES = (
    "A glacier is a persistent body of dense ice.",
    "Hi",
    "Ice that moves under its own weight, formed where snow outlasts the summer for many years, is called a glacier; "
    "it shapes valleys, carries stones of any size along, and holds most of the fresh water of the earth.",
    "The printer is out of paper again, and nobody knows where the new box went.",
)


def embed(model: Encoder, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each row, of length 1."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        inputs = {"input_ids": ids, "token_type_ids": jnp.zeros_like(ids)}
        hidden = nnx.merge(graph, state).encode(inputs, lengths)["last_hidden_state"]
        mean = mean_over_tokens(hidden, lengths).astype(jnp.float32)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return np.asarray(run(state, ids, lengths))


@pytest.mark.parametrize(("dtype", "least"), few([("float32", 0.99999), ("bfloat16", 0.999)], [("float32", 0.99999)]))
def test_embeddings_equal_those_of_transformers(
    dtype: str, least: float, minilm: Path, minilm_checkpoint: Path
) -> None:
    batch = AutoTokenizer.from_pretrained(minilm)(list(SENTENCES), padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(minilm)(**batch).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(mean).numpy()

    model = iceformer.load_model(minilm_checkpoint, dtype)
    assert isinstance(model, Encoder)
    ids, lengths = (array.numpy().astype(np.int32) for array in (batch["input_ids"], mask.sum(1)))
    assert len(set(lengths)) == len(SENTENCES)
    cosines = (embed(model, ids, lengths) * expected).sum(1)
    assert cosines.min() >= least
    # They mean something: two sentences are about glaciers.
    assert expected[0] @ expected[2] > expected[0] @ expected[3] + 0.3
