"""Pooling of sentence embedders and what follows it, against the modules of sentence-transformers."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from sentence_transformers.sentence_transformer import modules

from iceformer.model.pooling import MODES, TORCH_ACTIVATIONS, Dense, EmbeddingConfig, Normalize, SentenceEmbedding

LENGTHS = (9, 1, 5, 4)
HIDDEN = np.random.default_rng(0).standard_normal((len(LENGTHS), 9, 6)).astype(np.float32) - 2


def embed(config: EmbeddingConfig, prompt: int = 0, lengths: tuple[int, ...] = LENGTHS) -> np.ndarray:
    embedding = SentenceEmbedding(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    prompts = jnp.full(len(lengths), prompt, jnp.int32)
    return np.asarray(embedding(jnp.asarray(HIDDEN), jnp.asarray(lengths, jnp.int32), prompts))


def reference(modes: tuple[str, ...], include_prompt: bool, prompt: int) -> np.ndarray:
    given: Any = modes
    pooling = modules.Pooling(HIDDEN.shape[-1], given, include_prompt=include_prompt)
    mask = torch.arange(HIDDEN.shape[1]) < torch.tensor(LENGTHS)[:, None]
    features: dict[str, Any] = {"token_embeddings": torch.tensor(HIDDEN), "attention_mask": mask.long()}
    if prompt:
        features["prompt_length"] = prompt
    return pooling(features)["sentence_embedding"].numpy()


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), MODES, ("mean", "cls"), ("max", "max")])
def test_pools_each_row_without_its_padding(modes: tuple[str, ...], include_prompt: bool) -> None:
    for prompt in (0, 1, 3, 4):
        expected = reference(modes, include_prompt, prompt)
        found = embed(EmbeddingConfig(modes, include_prompt), prompt)
        # The largest of no tokens is minus infinity there.
        some = np.isfinite(expected).all(1)
        np.testing.assert_allclose(found[some], expected[some], atol=1e-6)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_tokens_are_finite(mode: str) -> None:
    config = EmbeddingConfig((mode,), steps=(Normalize(),))
    assert np.isfinite(embed(config, lengths=(0, 0, 9, 0))).all()


def test_what_lies_beyond_a_row_is_not_seen() -> None:
    hidden = np.where(np.arange(9)[:, None] < 4, HIDDEN[:1], np.nan)
    embedding = SentenceEmbedding(EmbeddingConfig(MODES), rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    assert np.isfinite(np.asarray(embedding(jnp.asarray(hidden), jnp.array([4])))).all()


def test_pools_bfloat16_in_float32() -> None:
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300, 8)), jnp.bfloat16)
    embedding = SentenceEmbedding(EmbeddingConfig(("mean",)), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    pooled = embedding(hidden, jnp.array([300]))
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0], np.asarray(hidden[0], np.float64).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", TORCH_ACTIVATIONS)
def test_activations_are_those_of_torch(name: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 101), [0.0, 30.0, -30.0]]).astype(np.float32)
    expected = getattr(torch.nn, name)()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(TORCH_ACTIVATIONS[name](jnp.asarray(x)), expected, atol=2e-6)


def test_widths_follow_the_steps() -> None:
    first, second = Dense(12, 5, True, "Tanh"), Dense(5, 7, False, "Identity")
    for steps in itertools.permutations((first, Normalize(), second)):
        config = EmbeddingConfig(("mean", "cls"), steps=steps)
        if steps.index(first) < steps.index(second):
            assert config.size(6) == 7
            assert embed(config).shape == (len(LENGTHS), 7)
        else:
            with pytest.raises(ValueError, match="in_features 5, but is given 12 numbers"):
                config.size(6)


def test_refuses_other_modes() -> None:
    for modes in ((), ("mean", "median")):
        with pytest.raises(ValueError, match="expected some of: cls, max, mean"):
            EmbeddingConfig(modes)
