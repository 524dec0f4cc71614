"""What every method of the registry has in common, and each method's formula in loops of numpy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import (
    METHODS,
    Antidiagonal,
    Clusters,
    DecodeSelection,
    Exact,
    Iceformer,
    KeyView,
    LabelCache,
    LowRank,
    Lsh,
    Mask,
    MeanPool,
    Method,
    ProductQuant,
    Rows,
    TwoStage,
    attend,
    attention_to_dict,
    make_method,
    register_method,
)
from iceformer.attention.plan import Plan

from ..few import few
from .reference import naive_attention, random_inputs

KEYS, HEAD_DIM, KEY_BLOCK = 192, 16, 8
SMALL: dict[str, Any] = {"budget": 64, "query_block": 16, "key_block": KEY_BLOCK, "sink": 4, "local": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 8, "query_share": 1.0},
    "label_cache": {"rank": 8, "query_share": 1.0},
    "product_quant": {"parts": 4, "bits": 4},
    "sparq": {"rank": 8},
    "lsh": {"tables": 24, "bits": 4},
    "antidiagonal": {"stride": 4},
}
ALL = sorted(METHODS)
FOR_NEW_TOKENS = [name for name in ALL if METHODS[name].single_queries]


@pytest.fixture
def name(form: str, request: pytest.FixtureRequest) -> str:
    """Of a method."""
    if form == "kernels" and not issubclass(METHODS[request.param], LowRank):
        pytest.skip("runs in XLA in both forms")
    return request.param


def method_of(name: str) -> Method:
    return make_method(name, **OPTIONS.get(name, {}))


@dataclass(frozen=True)
class Blind(MeanPool):
    """Finds all key blocks equal, so that the first are taken."""

    name: ClassVar[str] = "blind"

    def block_products(self, features: Any, index: Any) -> jax.Array:
        return 0 * super().block_products(features, index)


class Case:
    """Two rows of 2 KV heads and 4 query heads, the second shorter, and the constants of a method."""

    def __init__(self, method: Method, seed: int = 0) -> None:
        self.query, self.key, self.value = random_inputs(seed, 2, 4, 2, KEYS, KEYS, HEAD_DIM)
        self.key[..., :3] *= 2
        self.lengths = np.array([KEYS, 150])
        learned = method.calibrate(self.query[0], self.key[0])
        self.constants = {name: jnp.asarray(array) for name, array in learned.items()}

    def attend(self, attention: Any, start: int = 0, end: int = KEYS) -> np.ndarray:
        rows = Rows(
            jnp.arange(2, dtype=jnp.int32),
            jnp.full(2, start, jnp.int32),
            jnp.asarray(self.lengths, jnp.int32),
        )
        keys = KeyView(jnp.asarray(self.key), jnp.asarray(self.value))
        query = jnp.asarray(self.query[:, :, start:end])
        return np.asarray(_attend(attention, query, keys, rows, self.constants))

    def exact(self) -> np.ndarray:
        return naive_attention(
            self.query, self.key, self.value, causal=True, offset=np.zeros(2, int), lengths=self.lengths
        )


def _attend(attention: Any, query: Any, keys: Any, rows: Any, constants: Any) -> Any:
    return jax.jit(lambda *arrays: attend(attention, arrays[0], arrays[1], arrays[2], Mask(), arrays[3]))(
        query, keys, rows, constants
    )


@pytest.mark.parametrize("name", few(ALL, ["antidiagonal", "label_cache"]), indirect=True)
def test_chunks_of_ragged_rows_equal_one_call_and_lie_near_exact_attention(name: str) -> None:
    case, config = Case(method_of(name)), TwoStage(method_of(name), **SMALL)
    whole = case.attend(config)
    pieces = np.concatenate([case.attend(config, 0, 96), case.attend(config, 96, KEYS)], axis=2)
    exact = case.exact()
    for row, length in enumerate(case.lengths):
        seen = whole[row, :, :length]
        assert np.isfinite(seen).all()
        np.testing.assert_allclose(pieces[row, :, :96], whole[row, :, :96], atol=1e-5)
        np.testing.assert_allclose(pieces[row, :, length - 16 : length], exact[row, :, length - 16 : length], atol=1e-5)
    error = np.linalg.norm(whole[0] - exact[0])
    assert 0 < error < np.linalg.norm(case.attend(replace(config, method=Blind()))[0] - exact[0])
    np.testing.assert_array_equal(case.attend(config), whole)


@pytest.mark.parametrize("name", few(ALL, ["label_cache"]), indirect=True)
def test_a_budget_for_every_key_is_exact_attention(name: str) -> None:
    method = method_of(name)
    assert TwoStage(method, **{**SMALL, "budget": KEYS}).within(KEYS, Mask()) == Exact()
    # Exact attention is not what computes it here.
    config = TwoStage(method, **{**SMALL, "budget": KEYS - 1}, candidates=4.0, exact_last_block=False)
    case = Case(method)
    np.testing.assert_allclose(case.attend(config)[1, :, :150], case.exact()[1, :, :150], atol=1e-5)


@pytest.mark.parametrize("name", few(FOR_NEW_TOKENS, ["clusters"]), indirect=True)
def test_new_tokens_attend_to_a_selection(name: str) -> None:
    method = method_of(name)
    config = DecodeSelection(method, budget=64, key_block=KEY_BLOCK, sink=4, local=8)
    case = Case(method)
    case.query = 4 * case.query[:, :, -1:]  # of random keys few matter then
    rows = Rows(
        jnp.arange(2, dtype=jnp.int32), jnp.asarray(case.lengths - 1, jnp.int32), jnp.asarray(case.lengths, jnp.int32)
    )
    keys = KeyView(jnp.asarray(case.key), jnp.asarray(case.value))
    exact = naive_attention(
        case.query, case.key, case.value, causal=True, offset=case.lengths - 1, lengths=case.lengths
    )
    error, of_blind = (
        np.linalg.norm(np.asarray(_attend(each, jnp.asarray(case.query), keys, rows, case.constants)) - exact)
        for each in (config, replace(config, method=Blind()))
    )
    assert 0 < error < of_blind


@pytest.mark.parametrize("name", ALL)
def test_json_names_the_method_and_its_options(name: str) -> None:
    given = attention_to_dict(TwoStage(method_of(name), **SMALL))["method"]
    assert make_method(given.pop("name"), **given) == method_of(name)
    assert METHODS[name].source


def products(method: Method, query: np.ndarray, key: np.ndarray, constants: Any = None) -> np.ndarray:
    """[blocks, ranking queries] of one head."""
    fields = method.fields(HEAD_DIM, KEY_BLOCK)
    given = {name: jnp.asarray(array) for name, array in (constants or {}).items()}
    ranking = method.ranking_queries(jnp.asarray(query)[None, None], jnp.ones((1, 1, len(query)), bool), given)
    index = {}
    for name, field in fields.items():
        entries = method.entries(name, jnp.asarray(key).reshape(1, -1, field.tokens, HEAD_DIM), given)[0]
        index[name] = entries.reshape(len(key) // KEY_BLOCK, -1, *entries.shape[1:])
    found = method.block_products(ranking.features[0, 0], index)
    found = jnp.max(found.reshape(len(key) // KEY_BLOCK, -1, found.shape[1]), axis=1)
    return np.asarray(found * ranking.scale[0, 0])


def calibrated(method: Method, query: np.ndarray, key: np.ndarray) -> dict[str, np.ndarray]:
    """By one head's queries, over and over, and keys."""
    return method.calibrate(np.tile(query, (-(-len(key) // len(query)), 1))[None, : len(key)], key[None])


@pytest.fixture
def query(form: str) -> np.ndarray:
    if form == "kernels":
        pytest.skip("no attention is called")
    return np.random.default_rng(1).standard_normal((8, HEAD_DIM)).astype(np.float32)


@pytest.fixture
def key() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((48, HEAD_DIM)).astype(np.float32)


def test_antidiagonal(query: np.ndarray, key: np.ndarray) -> None:
    stride = 4
    expected = np.full((48 // KEY_BLOCK, 8 // stride), -np.inf)
    for i, j in np.ndindex(8 // stride, 48 // stride):
        total = sum(query[stride * i + stride - 1 - p] @ key[stride * j + p] for p in range(stride)) / stride
        block = j * stride // KEY_BLOCK
        expected[block, i] = max(expected[block, i], total)
    np.testing.assert_allclose(products(Antidiagonal(stride), query, key), expected, rtol=1e-5)


def test_antidiagonals_of_a_piece_that_is_not_whole_count_what_is_there(query: np.ndarray) -> None:
    method, present = Antidiagonal(4), jnp.arange(8) < 6
    spoilt = np.where(np.arange(8)[:, None] < 6, query, np.nan)
    ranking = method.ranking_queries(jnp.asarray(spoilt)[None, None], present[None, None], {})
    assert np.isfinite(ranking.features).all()
    assert ranking.present.tolist() == [[[True, True]]]
    assert ranking.lane.tolist() == [[[3, 7]]]


def test_label_cache_keeps_the_heaviest_channels(query: np.ndarray, key: np.ndarray) -> None:
    method = LabelCache(rank=4, query_share=1.0)
    constants = calibrated(method, query, key)
    channels = np.argsort(-np.abs(query).mean(axis=0) * np.abs(key).mean(axis=0))[:4]
    picked = np.flatnonzero(constants["key_projection"][0].any(axis=1))
    assert sorted(channels) == picked.tolist()
    expected = (query[:, channels] @ key[:, channels].T).reshape(8, -1, KEY_BLOCK).max(axis=2).T
    np.testing.assert_allclose(products(method, query, key, constants), expected, atol=0.15)


def test_product_quant_looks_up_the_nearest_centroids(query: np.ndarray, key: np.ndarray) -> None:
    method = ProductQuant(parts=4, bits=3)
    constants = calibrated(method, query, key)
    centroids = constants["key_centroids"][0]
    expected = np.full((48 // KEY_BLOCK, 8), -np.inf)
    for number, of_key in enumerate(key.reshape(48, 4, -1)):
        nearest = [c[np.square(c - part).sum(axis=1).argmin()] for part, c in zip(of_key, centroids, strict=True)]
        block = number // KEY_BLOCK
        expected[block] = np.maximum(expected[block], query @ np.concatenate(nearest))
    np.testing.assert_allclose(products(method, query, key, constants), expected, rtol=1e-4, atol=1e-5)


def test_as_many_centroids_as_keys_lose_nothing(query: np.ndarray, key: np.ndarray) -> None:
    method = ProductQuant(parts=1, bits=4)
    constants = calibrated(method, query, key[:16])
    expected = (query @ key[:16].T).reshape(8, -1, KEY_BLOCK).max(axis=2).T
    np.testing.assert_allclose(products(method, query, key[:16], constants), expected, rtol=1e-4, atol=1e-5)


def test_lsh_counts_collisions(query: np.ndarray, key: np.ndarray) -> None:
    method = Lsh(tables=30, bits=3, seed=5)
    constants = calibrated(method, query, key)
    signs = np.random.default_rng(5).integers(0, 2, (HEAD_DIM, 90), np.int8) * 2 - 1
    sides = [(x @ signs > 0).reshape(-1, 30, 3) for x in (query, key - key.mean(axis=0))]
    collisions = (sides[0][:, None] == sides[1]).all(axis=3).sum(axis=2)
    expected = collisions.reshape(8, -1, KEY_BLOCK).max(axis=2).T
    np.testing.assert_array_equal(products(method, query, key, constants), np.where(expected >= 2, expected, 0))


def test_clusters_of_one_key_are_exact_and_one_cluster_is_the_mean(query: np.ndarray, key: np.ndarray) -> None:
    logits = (query @ key.T).reshape(8, -1, KEY_BLOCK)
    np.testing.assert_allclose(products(Clusters(1), query, key), logits.max(axis=2).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(products(Clusters(KEY_BLOCK), query, key), logits.mean(axis=2).T, rtol=1e-4, atol=1e-5)


def test_clusters_find_keys_that_lie_together(query: np.ndarray) -> None:
    centres = np.random.default_rng(3).standard_normal((2, HEAD_DIM)).astype(np.float32)
    key = np.repeat(np.tile(centres, (6, 1)), KEY_BLOCK // 2, axis=0)
    expected = np.repeat((query @ centres.T).max(axis=1)[None], 6, axis=0)
    np.testing.assert_allclose(products(Clusters(4), query, key), expected, rtol=1e-4, atol=1e-5)


def test_iceformers_priorities(query: np.ndarray, key: np.ndarray) -> None:
    method = Iceformer(composites=2, simples=3, seed=7)
    constants = calibrated(method, query, key)
    longest = 1.1 * np.linalg.norm(key, axis=1).max()
    directions = np.random.default_rng(7).standard_normal((HEAD_DIM + 1, 6), np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    lifted = np.c_[key / longest, np.sqrt(1 - np.square(key / longest).sum(axis=1))] @ directions
    of_query = np.c_[query / np.linalg.norm(query, axis=1)[:, None], np.zeros(8)] @ directions
    expected = np.zeros((48 // KEY_BLOCK, 8))
    for block, number in np.ndindex(expected.shape):
        keys = lifted[block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
        gaps = [max(k.min() - q, q - k.max(), 0) for q, k in zip(of_query[number], keys.T, strict=True)]
        expected[block, number] = -min(max(gaps[:3]), max(gaps[3:]))
    np.testing.assert_allclose(products(method, query, key, constants), expected, atol=1e-5)


def test_iceformer_finds_the_largest_products_as_published() -> None:
    """Of 1024 keys, the recall of the 20 largest products of each query, 200 keys visited, on keys with directions."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((4, HEAD_DIM)).astype(np.float32)
    key = (rng.standard_normal((1024, 4)) @ basis + 0.3 * rng.standard_normal((1024, HEAD_DIM))).astype(np.float32)
    query = (rng.standard_normal((64, 4)) @ basis).astype(np.float32)
    method = Iceformer()
    constants = {name: jnp.asarray(array) for name, array in calibrated(method, query, key).items()}
    index = {
        name: method.entries(name, jnp.asarray(key)[None, :, None], constants)[0][:, None]
        for name in method.fields(HEAD_DIM, 1)
    }
    ranking = method.ranking_queries(jnp.asarray(query)[None, None], jnp.ones((1, 1, 64), bool), constants)
    visited = np.argsort(-np.asarray(method.block_products(ranking.features[0, 0], index)).T, axis=1, kind="stable")[
        :, :200
    ]
    exact = query @ key.T
    recall = []
    for number in range(64):
        best = visited[number][np.argsort(-exact[number, visited[number]])[:20]]
        recall.append(len(set(best) & set(np.argsort(-exact[number])[:20])) / 20)
    chance = 200 / 1024
    assert np.mean(recall) > 3 * chance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoStage("lsh"), "mass is 0.97, but lsh only ranks keys"),
        (lambda: TwoStage("iceformer", mass=0.9, budget=1024), "mass is 0.9, but iceformer only ranks keys"),
        (lambda: DecodeSelection("lsh", mass=0.5), "mass is 0.5, but lsh only ranks keys"),
        (lambda: DecodeSelection("antidiagonal"), "antidiagonal, which ranks for blocks of queries"),
        (
            lambda: Plan(TwoStage(Antidiagonal(16), budget=1024)).fields(HEAD_DIM),
            "stride is 16, expected a divisor of key_block, which is 8",
        ),
        (lambda: ProductQuant(parts=3).fields(HEAD_DIM, 8), "parts is 3, expected a divisor of head_dim, which is 16"),
        (lambda: ProductQuant(bits=9), "bits is 9"),
        (lambda: Antidiagonal(3), "stride is 3, expected a power of two"),
        (lambda: Lsh(tables=0), "tables is 0"),
        (lambda: Clusters(0), "cluster_size is 0"),
        (lambda: Iceformer(simples=0), "simples is 0"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_method_from_outside_joins_by_name() -> None:
    @register_method
    class Tail(LowRank):
        name = "tail"

    try:
        assert register_method(Tail) is Tail
        assert isinstance(TwoStage("tail").ranking, Tail)
        with pytest.raises(ValueError, match=r"method 'tail' is .*Tail already"):
            register_method(type("Other", (LowRank,), {"name": "tail"}))
    finally:
        del METHODS["tail"]


def test_the_documented_example_is_a_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if "register_method" in block).split("```")[0]
    namespace: dict[str, Any] = {}
    try:
        exec(code, namespace)
        method = namespace["LongestKey"]()
        case = Case(method)
        found = case.attend(TwoStage("longest_key", **SMALL))
        assert np.isfinite(found[0]).all()
        longest = np.argmax(np.linalg.norm(case.key[0, 0, :96], axis=1)) // KEY_BLOCK
        scores = products(method, case.query[0, 0, :8], case.key[0, 0, :96])
        assert (scores.argmax(axis=0) == longest).all()
    finally:
        METHODS.pop("longest_key", None)


def test_the_search_as_published_selects_for_each_query_alone() -> None:
    method = Iceformer()
    config = TwoStage(
        method, budget=20, candidates=9.0, query_block=1, key_block=1, sink=0, local=0, exact_last_block=False
    )
    case = Case(method)
    found, exact = case.attend(config), case.exact()
    error = np.linalg.norm(found[0] - exact[0]) / np.linalg.norm(exact[0])
    wider = case.attend(replace(config, budget=60))
    assert np.linalg.norm(wider[0] - exact[0]) / np.linalg.norm(exact[0]) < error < 0.5
