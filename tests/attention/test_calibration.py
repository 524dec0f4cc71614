"""Projections for low-rank scores: exact at full rank, and never worse than principal components below it."""

import numpy as np
import pytest

from iceformer.attention.calibration import logit_projections


def heads(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries of 4 heads and keys of 2, with unequal spread over directions and a mean."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((2, 16, 16)) * np.geomspace(4, 0.1, 16)
    key = (rng.standard_normal((2, 300, 16)) @ mix + rng.standard_normal((2, 1, 16))).astype(np.float32)
    query = (rng.standard_normal((4, 300, 16)) * np.geomspace(0.1, 2, 16)).astype(np.float32)
    return query, key


def ranking_error(query: np.ndarray, key: np.ndarray, low_query: np.ndarray, low_key: np.ndarray) -> float:
    """Mean square error of the logits, up to a constant per query, which no ranking sees."""
    difference = query @ key.T - low_query @ low_key.T
    return float(np.mean((difference - difference.mean(axis=1, keepdims=True)) ** 2))


def test_full_rank_keeps_every_logit() -> None:
    query, key = heads(0)
    projections = logit_projections(query, key, rank=16)
    for head in range(4):
        a, b = (x[head // 2] for x in projections)
        assert ranking_error(query[head], key[head // 2], query[head] @ a, key[head // 2] @ b) < 1e-4


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_beats_principal_components_of_the_keys(rank) -> None:
    query, key = heads(1)
    projections = logit_projections(query, key, rank=rank)
    for head in range(2):
        both = query[2 * head : 2 * head + 2].reshape(-1, 16)
        centred = key[head] - key[head].mean(axis=0)
        components = np.linalg.svd(centred, full_matrices=False)[2][:rank].T
        a, b = (x[head] for x in projections)
        ours = ranking_error(both, key[head], both @ a, key[head] @ b)
        assert ours < ranking_error(both, key[head], both @ components, key[head] @ components)


def test_constant_keys_give_finite_projections() -> None:
    query, key = heads(2)
    projections = logit_projections(query, np.ones_like(key), rank=4)
    assert np.isfinite(projections).all()


def test_a_rank_above_the_head_dim_keeps_everything() -> None:
    query, key = heads(3)
    np.testing.assert_array_equal(logit_projections(query, key, rank=40), logit_projections(query, key, rank=16))
