"""Decoding over a selection, against loops in numpy that know nothing of the package."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer.attention import (
    Call,
    DecodeSelection,
    Exact,
    KeyView,
    LowRank,
    Mask,
    MeanPool,
    Method,
    PageBound,
    Plan,
    Rows,
    Sparq,
    TwoStage,
    attend,
    attend_and_keep,
    attention_to_dict,
    extend,
)
from iceformer.attention.decode_selection import Chosen
from iceformer.attention.sampling import draw

from ..few import few
from .calls import XLA_IS_SLOW, constants_of, scattered
from .reference import naive_attention, random_inputs

KEYS, HEAD_DIM, RANK, KEY_BLOCK = 300, 16, 6, 4
SMALL: dict[str, Any] = {"budget": 48, "key_block": KEY_BLOCK, "sink": 5, "local": 10}
# Keys that each row sees; the third row is idle, the fourth attends exactly.
SEEN = (300, 131, 0, 47, 49)
Estimate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def low_rank(query: np.ndarray, keys: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """[group], for the keys of one block, before the scale, as the other estimates."""
    projected = query @ basis[0]
    unit = np.abs(projected).max(axis=1, keepdims=True) / 127
    rounded = np.round(projected / unit) * unit
    return np.max(rounded @ np.clip(np.round(keys @ basis[1]), -127, 127).T, axis=1)


def mean_pool(query: np.ndarray, keys: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return query @ keys.mean(axis=0)


def quest(query: np.ndarray, keys: np.ndarray, basis: np.ndarray) -> np.ndarray:
    low, high = keys.min(axis=0), keys.max(axis=0)
    return np.array([sum(max(q * a, q * b) for q, a, b in zip(x, low, high, strict=True)) for x in query])


def cuboid_mean(query: np.ndarray, keys: np.ndarray, basis: np.ndarray) -> np.ndarray:
    centre = (keys.min(axis=0) + keys.max(axis=0)) / 2
    width = np.mean([np.abs(key - centre) for key in keys], axis=0)
    return np.array([x @ centre + np.abs(x) @ width for x in query])


def sparq(query: np.ndarray, keys: np.ndarray, basis: np.ndarray) -> np.ndarray:
    kept = np.argsort(-np.abs(query).sum(axis=0))[:RANK]
    shares = [np.abs(x[kept]).sum() / np.abs(x).sum() for x in query]
    return np.array([(keys[:, kept] @ x[kept]).max() / np.sqrt(s) for x, s in zip(query, shares, strict=True)])


METHODS: dict[str, tuple[Method, Estimate]] = {
    "low_rank": (LowRank(rank=RANK, query_share=0.3), low_rank),
    "mean_pool": (MeanPool(), mean_pool),
    "quest": (PageBound(), quest),
    "cuboid_mean": (PageBound("cuboid_mean"), cuboid_mean),
    "sparq": (Sparq(rank=RANK), sparq),
}


def weights_of(logits: np.ndarray) -> np.ndarray:
    """The softmax over the first axis."""
    weights = np.exp(logits - logits.max(axis=0))
    return weights / weights.sum(axis=0)


def naive_blocks(config: DecodeSelection, logits: np.ndarray, seen: int, start: int) -> list[int]:
    """The chosen blocks of one head, from estimated logits [ranked blocks, group]."""
    size = config.key_block
    mean = weights_of(logits).mean(axis=1)
    sink = [block for block in range(-(-config.sink // size)) if (block + 1) * size <= start]
    local = len({position // size for position in range(start, seen)})
    order = sink + sorted((b for b in range(len(mean)) if b not in sink), key=lambda b: (-mean[b], b))
    chosen: list[int] = []
    for block in order[: config.budget // size - local]:
        if config.mass and block not in sink and sum(mean[chosen]) >= config.mass:
            break
        chosen.append(block)
    return sorted(chosen)


def naive_selection(
    config: DecodeSelection, estimate: Estimate, query: np.ndarray, key: np.ndarray, seen: int, basis: Any, mask: Mask
) -> list[int]:
    """The chosen blocks of one head; none of a row that attends exactly."""
    size = config.key_block
    start = max(seen - 1 - config.local, 0) // size * size
    if seen <= max(config.budget, config.crossover):
        return []
    factor = HEAD_DIM**-0.5 if mask.scale is None else mask.scale
    logits = np.array([estimate(query, key[b * size : (b + 1) * size], basis) for b in range(start // size)]) * factor
    if mask.softcap is not None:
        logits = mask.softcap * np.tanh(logits / mask.softcap)
    return naive_blocks(config, logits, seen, start)


class Case:
    """A decoding call over rows that lie in any order in memory, which is NaN elsewhere and past each row's end."""

    def __init__(
        self, seed: int, query_heads: int = 4, page: int = 0, dtype: str = "float32", seen: Any = SEEN
    ) -> None:
        query, key, value = random_inputs(seed, len(seen), query_heads, 2, 1, KEYS, HEAD_DIM)
        key[..., :3] *= 3  # so that few components matter, and few keys
        rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in (1.5 * query, key, value)]
        self.query, self.key, self.value = rounded
        self.seen, self.page = np.array(seen), page
        past = (np.arange(KEYS) >= self.seen[:, None])[:, None, :, None]
        stale = [jnp.asarray(np.where(past, np.nan, x), dtype) for x in (self.key, self.value)]
        keys, slot = scattered(stale[0], stale[1], page, seed)
        idle = self.seen == 0
        rows = Rows(
            jnp.where(idle, -1, slot).astype(jnp.int32),
            jnp.asarray(np.where(idle, 7, self.seen - 1), jnp.int32),
            jnp.asarray(np.where(idle, 8, self.seen), jnp.int32),
        )
        basis = np.random.default_rng(seed).standard_normal((2, 2, HEAD_DIM, RANK)).astype(np.float32)
        basis *= np.array([0.1, 10]).reshape(2, 1, 1) / np.sqrt(RANK)
        self.basis = np.asarray(jnp.asarray(basis, dtype), np.float32)
        self.call = Call(jnp.asarray(self.query, dtype), keys, rows, Mask(), constants_of(jnp.asarray(self.basis)))

    def attend(self, config: DecodeSelection, **mask: Any) -> np.ndarray:
        """[rows, query_heads, value_dim]"""
        return np.asarray(run(config, self._call(mask)), np.float32)[:, :, 0]

    def chosen(self, config: DecodeSelection, **mask: Any) -> dict[tuple[int, int], list[int]]:
        """The blocks of each row and KV head."""
        found = choose(config, self._call(mask))
        pairs = zip(np.asarray(found.blocks), np.asarray(found.counts), strict=True)
        return {divmod(head, 2): list(blocks[:count]) for head, (blocks, count) in enumerate(pairs)}

    def expected(self, config: DecodeSelection, estimate: Estimate, **mask: Any) -> tuple[dict[Any, list[int]], Any]:
        """Blocks and output by the loops."""
        blocks = {}
        allowed = np.zeros((*self.query.shape[:2], 1, KEYS), bool)
        for row, head in np.ndindex(len(self.seen), 2):
            seen, half = int(self.seen[row]), self.query.shape[1] // 2
            group = slice(head * half, (head + 1) * half)
            blocks[row, head] = naive_selection(
                config, estimate, self.query[row, group, 0], self.key[row, head], seen, self.basis[head], Mask(**mask)
            )
            if seen <= max(config.budget, config.crossover):
                allowed[row, group] = True
                continue
            for block in blocks[row, head]:
                allowed[row, group, :, block * config.key_block : (block + 1) * config.key_block] = True
            allowed[row, group, :, max(seen - 1 - config.local, 0) // config.key_block * config.key_block :] = True
        rows: dict[str, Any] = {"offset": self.seen - 1, "lengths": self.seen}
        output = naive_attention(self.query, self.key, self.value, causal=True, chosen=allowed, **rows, **mask)
        return blocks, output[:, :, 0]

    def _call(self, mask: dict[str, Any]) -> Call:
        return self.call._replace(mask=Mask(**mask))


def run(config: DecodeSelection, call: Call) -> jax.Array:
    """Attention, compiled for the call's mask."""
    return jax.jit(lambda query, keys, rows, constants: attend(config, query, keys, rows, call.mask, constants))(
        call.query, call.keys, call.rows, call.constants
    )


def prepared(config: DecodeSelection, call: Call) -> Call:
    return config.prepared(call._replace(rows=call.rows.settled()))


def choose(config: DecodeSelection, call: Call) -> Chosen:
    """The blocks of all heads, compiled."""
    return jax.jit(
        lambda query, keys, rows, constants: config.choose(
            prepared(config, Call(query, keys, rows, call.mask, constants))
        )
    )(call.query, call.keys, call.rows, call.constants)


CASES = {
    "low_rank": ("low_rank", 4, 0, {}, {}),
    "low_rank, by mass": ("low_rank", 2, 128, {"mass": 0.8, "key_block": 8}, {"softcap": 10.0, "scale": 0.3}),
    "mean_pool": ("mean_pool", 8, 0, {"crossover": 140}, {}),
    "quest": ("quest", 4, 128, {"key_block": 2}, {}),
    "cuboid_mean": ("cuboid_mean", 2, 0, {"mass": 0.6}, {"softcap": 4.0}),
    "sparq": ("sparq", 4, 128, {}, {}),
    "sparq, by mass": ("sparq", 6, 0, {"key_block": 1, "sink": 0, "local": 0, "mass": 0.5}, {"scale": 0.3}),
}


@pytest.mark.parametrize(
    ("form", "case"),
    few(
        itertools.product(["xla", "kernels"], CASES),
        [
            *(("xla", case) for case in ("low_rank, by mass", "cuboid_mean")),
            *(("kernels", case) for case in ("low_rank, by mass", "mean_pool", "cuboid_mean", "sparq, by mass")),
        ],
    ),
    indirect=["form"],
)
def test_attends_to_what_loops_choose(case: str) -> None:
    name, query_heads, page, options, mask = CASES[case]
    method, estimate = METHODS[name]
    config, call = DecodeSelection(method, **{**SMALL, **options}), Case(3, query_heads, page)
    blocks, output = call.expected(config, estimate, **mask)
    assert call.chosen(config, **mask) == blocks
    found = call.attend(config, **mask)
    np.testing.assert_allclose(found, output, atol=3e-6)
    assert not found[2].any(), "the idle row"
    attended = [len(chosen) for (row, _), chosen in blocks.items() if row == 0]
    assert 0 < max(attended) < KEYS // config.key_block / 2


@XLA_IS_SLOW
@pytest.mark.parametrize("name", few(["low_rank", "quest", "sparq"], ["quest"]))
def test_bfloat16_chooses_and_attends_alike(name: str) -> None:
    method, estimate = METHODS[name]
    config, case = DecodeSelection(method, **SMALL), Case(4, dtype="bfloat16", page=128)
    _, output = case.expected(config, estimate)
    # Rounding decides between two blocks now and then.
    assert np.quantile(np.abs(case.attend(config) - output), 0.9) < 0.02


def test_a_budget_for_every_key_is_exact_attention() -> None:
    case = Case(5)
    rows: dict[str, Any] = {"offset": case.seen - 1, "lengths": case.seen}
    expected = naive_attention(case.query, case.key, case.value, causal=True, **rows)[:, :, 0]
    config = DecodeSelection(METHODS["low_rank"][0], **{**SMALL, "budget": KEYS})
    assert config.within(KEYS, Mask()) == Exact()
    np.testing.assert_allclose(case.attend(config), expected, atol=3e-6)


@XLA_IS_SLOW
def test_the_whole_mass_is_exact_attention() -> None:
    """But for keys that weigh next to nothing."""
    case = Case(6)
    config = DecodeSelection(Sparq(rank=HEAD_DIM), budget=KEYS - 1, mass=1.0, sink=5, local=10)
    assert config.within(KEYS, Mask()) == config
    assert len(case.chosen(config)[0, 0]) > KEYS // 2
    rows: dict[str, Any] = {"offset": case.seen - 1, "lengths": case.seen}
    expected = naive_attention(case.query, case.key, case.value, causal=True, **rows)[:, :, 0]
    np.testing.assert_allclose(case.attend(config), expected, atol=3e-5)


@XLA_IS_SLOW
def test_a_smaller_mass_chooses_fewer_blocks() -> None:
    case = Case(7)
    sizes = []
    for mass in (0.4, 0.7, 0.9, 0.0):
        chosen = case.chosen(DecodeSelection(METHODS["low_rank"][0], **{**SMALL, "budget": 200, "mass": mass}))
        sizes.append([len(chosen[0, head]) for head in range(2)])
    for fewer, more in itertools.pairwise(sizes):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


@XLA_IS_SLOW
@pytest.mark.parametrize("options", few([{}, {"reallocate": True}], [{"reallocate": True}]))
def test_a_budget_for_the_neighbourhood_only(options: dict[str, Any]) -> None:
    config = DecodeSelection(METHODS["sparq"][0], budget=12, key_block=4, sink=0, local=8, **options)
    case = Case(18)
    blocks, output = case.expected(config, sparq)
    assert not any(blocks.values())
    np.testing.assert_allclose(case.attend(config), output, atol=3e-6)


def test_rows_within_the_budget_choose_nothing() -> None:
    chosen = Case(8).chosen(DecodeSelection(METHODS["quest"][0], **SMALL))
    assert [bool(chosen[row, 0]) for row in range(len(SEEN))] == [True, True, False, False, True]


@pytest.mark.parametrize("page", few([0, 128], [128]))
def test_reallocation_gives_the_rest_to_the_mean_value(page: int) -> None:
    config = DecodeSelection(METHODS["sparq"][0], **SMALL, reallocate=True)
    case = Case(9, page=page)
    blocks, attended = case.expected(config, sparq)
    found = case.attend(config)
    for row, head in np.ndindex(len(SEEN), 4):
        seen, chosen = SEEN[row], blocks[row, head // 2]
        if seen <= config.budget:
            np.testing.assert_allclose(found[row, head], attended[row, head], atol=3e-6)
            continue
        start = max(seen - 1 - config.local, 0) // KEY_BLOCK * KEY_BLOCK
        key, query = case.key[row, head // 2, :seen], case.query[row, head, 0]
        group = case.query[row, head // 2 * 2 : head // 2 * 2 + 2, 0]
        estimate = np.array([sparq(group, key[b : b + KEY_BLOCK], case.basis) for b in range(0, start, KEY_BLOCK)])
        share = weights_of(estimate[:, head % 2] * HEAD_DIM**-0.5)[chosen].sum()
        weight = np.exp(key @ query * HEAD_DIM**-0.5)
        of_chosen = sum(weight[b * KEY_BLOCK : (b + 1) * KEY_BLOCK].sum() for b in chosen)
        all_attended = of_chosen + weight[start:].sum()
        alpha = all_attended / (all_attended + of_chosen * (1 - share) / share)
        assert 0.1 < alpha < 0.999
        expected = alpha * attended[row, head] + (1 - alpha) * case.value[row, head // 2, :seen].mean(axis=0)
        np.testing.assert_allclose(found[row, head], expected, atol=1e-5)


@XLA_IS_SLOW
def test_a_sample_is_drawn_of_the_keys_left_out_alike() -> None:
    """Every key that is left out as often as any other, and no other."""
    blocks, count, ranked, draws = jnp.array([0, 3, 4, 9, 0, 0]), jnp.int32(4), jnp.int32(11), 40
    left = [4 * block + i for block in range(11) if block not in (0, 3, 4, 9) for i in range(4)]
    drawn = jax.vmap(lambda seed: draw(seed, 8, blocks, count, ranked, 4))(jnp.arange(4000, dtype=jnp.uint32))
    found = np.bincount(np.asarray(drawn.position).ravel(), minlength=44)
    assert set(np.flatnonzero(found)) == set(left)
    expected = 4000 * 8 / len(left)
    assert np.abs(found[left] - expected).max() < 5 * np.sqrt(expected)
    assert bool(drawn.drawn.all())
    whole = draw(jnp.uint32(1), draws, blocks, count, ranked, 4)
    assert sorted(np.asarray(whole.position)[np.asarray(whole.drawn)]) == left
    assert float(whole.raised()) == 0.0


@XLA_IS_SLOW
def test_the_sampled_sums_are_unbiased_and_the_error_is_as_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key is always attended to: a value that only it has shows how large the sum of all weights is."""
    size, seeds = 64, 2000
    case, config = Case(10, seen=(KEYS,)), DecodeSelection(METHODS["low_rank"][0], **SMALL, sample=64)
    values = case.call.keys.value
    keys = case.call.keys._replace(value=values.at[..., 0].set(0.0).at[:, :, -1, 0].set(1.0))
    call = prepared(config, case.call._replace(keys=keys))
    chosen = config.choose(call)

    def of_seed(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        monkeypatch.setattr("iceformer.attention.decode_selection.seed_of", lambda *_: seed)
        return config.attend_chosen(call, chosen)[0, :, 0], config.sampling_error(call, chosen)[0]

    output, errors = map(np.asarray, jax.jit(partial(jax.lax.map, of_seed))(jnp.arange(seeds, dtype=jnp.uint32)))
    blocks = case.chosen(config)
    start = (KEYS - 1 - config.local) // KEY_BLOCK * KEY_BLOCK
    for head in range(4):
        weight = np.exp(case.key[0, head // 2] @ case.query[0, head, 0] * HEAD_DIM**-0.5)
        left = np.array([j for j in range(start) if j // KEY_BLOCK not in blocks[0, head // 2]])
        assert weight[left].sum() > 0.1 * weight.sum(), "there is something to sample"
        total = weight[-1] / output[:, head, 0]
        weighted = output[:, head, 1] * total
        for sums, exact in ((total, weight.sum()), (weighted, weight @ case.value[0, head // 2, :, 1])):
            assert abs(sums.mean() - exact) < 4 * sums.std() / np.sqrt(seeds)
        spread = len(left) * weight[left].std() / np.sqrt(size)
        np.testing.assert_allclose(total.std(), spread, rtol=0.1)
        np.testing.assert_allclose(np.sqrt(np.square(errors[:, head] * total).mean()), spread, rtol=0.1)


@pytest.mark.slow
def test_a_sample_is_the_same_every_time_and_another_at_another_position() -> None:
    config, case = DecodeSelection(METHODS["quest"][0], **SMALL, sample=16), Case(11)
    np.testing.assert_array_equal(case.attend(config), case.attend(config))
    call = prepared(config, case.call)
    errors = np.asarray(jax.jit(config.sampling_error)(call, choose(config, case.call)))
    assert (errors[:2] > 0).all()
    assert not errors[2:].any(), "nothing is left to chance"
    plain = DecodeSelection(METHODS["quest"][0], **SMALL)
    exact = DecodeSelection(METHODS["quest"][0], **{**SMALL, "budget": KEYS})
    error = [np.abs(case.attend(x) - case.attend(exact))[:2].mean() for x in (config, plain)]
    assert error[0] != error[1]


def test_as_many_draws_as_keys_are_exact_attention() -> None:
    config, case = DecodeSelection(METHODS["quest"][0], **SMALL, sample=KEYS), Case(12)
    rows: dict[str, Any] = {"offset": case.seen - 1, "lengths": case.seen}
    expected = naive_attention(case.query, case.key, case.value, causal=True, **rows)[:, :, 0]
    np.testing.assert_allclose(case.attend(config), expected, atol=3e-6)


@XLA_IS_SLOW
@pytest.mark.parametrize(
    ("method", "options"),
    few(
        [(PageBound(), {}), (PageBound("cuboid_mean"), {}), (Sparq(), {}), (LowRank(rank=RANK), {"reallocate": True})],
        [(PageBound("cuboid_mean"), {}), (LowRank(rank=RANK), {"reallocate": True})],
    ),
)
def test_the_index_follows_the_cache_from_call_to_call(method: Method, options: Any) -> None:
    """Calls begin and end in the middle of entries; an entry is right once it is whole."""
    plan = Plan(decode=DecodeSelection(method, **options))
    _, key, value = map(jnp.asarray, random_inputs(13, 1, 2, 2, 1, 256, HEAD_DIM))
    constants = constants_of(jnp.asarray(np.random.default_rng(13).standard_normal((2, 2, HEAD_DIM, RANK)), "float32"))
    fields = plan.fields(HEAD_DIM)
    cache = {name: jnp.full((2, 2, 256, HEAD_DIM), jnp.nan) for name in ("key", "value")}
    cache |= {name: jnp.zeros((2, 2, 256 // x.tokens, *x.shape), x.dtype) for name, x in fields.items()}
    start = 0
    for tokens in (100, 1, 1, 40, 70, 1, 43):
        rows = Rows(*(jnp.array([x], jnp.int32) for x in (1, start, start + tokens)))
        piece = np.s_[:, :, start : start + tokens]
        made = partial(plan.entries, constants=constants)
        cache = extend(cache, key[piece], value[piece], rows, Mask(), fields, made).cache
        start += tokens
    assert start == 256
    for name, field in fields.items():
        runs = (value if field.of_values else key)[0].reshape(2, -1, field.tokens, HEAD_DIM)
        np.testing.assert_array_equal(cache[name][1], plan.entries(name, runs, constants), err_msg=name)
        assert not np.asarray(cache[name][0], np.float32).any()


STEPS, REFRESH = 20, 6
# Keys that each row sees at first; the third row is idle, the fourth attends exactly for some steps.
FIRST_SEEN = (200, 131, 0, 45)


class Steps:
    """Rows that grow by a token a step, in slots of another order, and a state for these and one more slot."""

    def __init__(self, seed: int, config: DecodeSelection, page: int = 0, first_seen: Any = FIRST_SEEN) -> None:
        self.config, self.first_seen = config, np.array(first_seen)
        query, key, value = random_inputs(seed, len(first_seen), 4, 2, STEPS, KEYS, HEAD_DIM)
        key[..., :3] *= 3
        self.query, self.key, self.value = 1.5 * query, key, value
        self.keys, self.slot = scattered(jnp.asarray(key), jnp.asarray(value), page, seed)
        basis = np.random.default_rng(seed).standard_normal((2, 2, HEAD_DIM, RANK)).astype(np.float32)
        self.basis = basis * np.array([0.1, 10], np.float32).reshape(2, 1, 1) / np.sqrt(RANK, dtype=np.float32)
        self.nothing = {
            name: jnp.zeros((len(first_seen) + 1, *x.shape), x.dtype) for name, x in config.state(2).items()
        }
        self._step = jax.jit(
            lambda query, rows, state: attend_and_keep(config, self.call(query, rows, state)), donate_argnums=2
        )

    def call(self, query: Any, rows: Rows, state: Any) -> Call:
        # What is in memory beside the rows is never looked at, but may be indexed.
        keys = self.keys._replace(key=jnp.nan_to_num(self.keys.key))
        return Call(query, keys, rows, Mask(), constants_of(jnp.asarray(self.basis)), state)

    def rows(self, step: int) -> Rows:
        idle = self.first_seen == 0
        offset = jnp.asarray(np.where(idle, 7, self.first_seen - 1 + step), jnp.int32)
        return Rows(jnp.where(idle, -1, self.slot).astype(jnp.int32), offset, offset + 1)

    def run(self, state: Any, steps: range = range(STEPS)) -> tuple[np.ndarray, Any]:
        """The outputs [steps, rows, query_heads, value_dim], and the state after the last step."""
        outputs, state = [], jax.tree.map(jnp.copy, state)
        for step in steps:
            output, state = self._step(jnp.asarray(self.query[:, :, step : step + 1]), self.rows(step), state)
            outputs.append(np.asarray(output)[:, :, 0])
        return np.stack(outputs), state

    def expected(self, estimate: Estimate) -> np.ndarray:
        """By loops: what was chosen, and all keys from where the neighbourhood began then."""
        config, size = self.config, self.config.key_block
        room = -(-(config.refresh - 1) // size) * size
        choosing = replace(config, budget=config.budget - room, crossover=config.exact_keys, refresh=1)
        outputs = np.zeros((STEPS, *self.query.shape[:2], HEAD_DIM), np.float32)
        for row, head in np.ndindex(len(self.first_seen), 2):
            group, attended = slice(head * 2, head * 2 + 2), None
            for step in range(STEPS if self.first_seen[row] else 0):
                seen, query = int(self.first_seen[row]) + step, self.query[row, group, step]
                allowed = np.zeros((1, 2, 1, KEYS), bool)
                if seen <= config.exact_keys:
                    allowed[:] = True
                else:
                    if attended is None or (seen - 1) % config.refresh == 0:
                        arrays = query, self.key[row, head], seen, self.basis[head]
                        blocks = naive_selection(choosing, estimate, *arrays, Mask())
                        start = max(seen - 1 - config.local, 0) // size * size
                        attended = [*(b * size + i for b in blocks for i in range(size)), *range(start, KEYS)]
                    allowed[..., attended] = True
                    assert allowed[..., :seen].sum() <= 2 * config.budget
                one = np.s_[row : row + 1, head : head + 1]
                place: dict[str, Any] = {"offset": np.array([seen - 1]), "lengths": np.array([seen])}
                output = naive_attention(
                    query[None, :, None], self.key[one], self.value[one], causal=True, chosen=allowed, **place
                )
                outputs[step, row, group] = output[0, :, 0]
        return outputs


@XLA_IS_SLOW
@pytest.mark.parametrize(
    ("name", "page", "options"),
    [
        pytest.param("low_rank", 0, {}, marks=pytest.mark.slow),
        ("low_rank", 128, {"mass": 0.8, "key_block": 8, "budget": 56}),
        pytest.param("sparq", 128, {"key_block": 1, "sink": 0, "local": 0}, marks=pytest.mark.slow),
    ],
)
def test_a_selection_serves_some_tokens(name: str, page: int, options: dict[str, Any]) -> None:
    """Rows choose at different steps, and one begins to choose when it outgrows the budget."""
    method, estimate = METHODS[name]
    steps = Steps(20, DecodeSelection(method, **{**SMALL, **options}, refresh=REFRESH), page)
    found, state = steps.run(steps.nothing)
    np.testing.assert_allclose(found, steps.expected(estimate), atol=3e-6)
    every_token = Steps(20, replace(steps.config, refresh=1), page)
    assert not every_token.nothing
    fresh, _ = every_token.run({})
    assert np.abs(fresh - found).max() > 1e-3, "another selection"
    np.testing.assert_allclose(fresh, every_token.expected(estimate), atol=3e-6)
    chosen_at = np.asarray(state["chosen_seen"])
    busy = np.asarray(steps.slot)[steps.first_seen > 0]
    assert not np.delete(chosen_at, busy).any(), "idle rows write nothing"
    assert ((chosen_at[busy] - 1) % REFRESH == 0).all()


@XLA_IS_SLOW
@pytest.mark.parametrize("options", few([{}, {"sample": 16}], [{"sample": 16}]))
def test_only_rows_that_are_due_choose(options: dict[str, Any]) -> None:
    config = DecodeSelection(METHODS["low_rank"][0], **SMALL, **options, refresh=REFRESH)
    steps = Steps(21, config, first_seen=(200, 131, 0, 47))
    states, outputs = [steps.nothing], []
    for step in range(8):
        output, state = steps.run(states[-1], range(step, step + 1))
        states.append(state)
        outputs.append(output)
    for row in (0, 1, 3):
        slot = int(steps.slot[row])
        for step in range(8):
            seen = int(steps.first_seen[row]) + step
            before, after = (int(states[step + i]["chosen_seen"][slot]) for i in range(2))
            first = before == 0 and seen > config.exact_keys
            assert after == (seen if first or (before and (seen - 1) % REFRESH == 0) else before)
    assert np.isfinite(outputs).all()


PROMPTS = (Exact(), TwoStage(METHODS["low_rank"][0], budget=64, query_block=16))


@XLA_IS_SLOW
@pytest.mark.parametrize("prompt", few(PROMPTS, PROMPTS[1:]))
def test_a_prompt_leaves_no_selection_in_its_slot(prompt: Any) -> None:
    """Another sequence takes over the slot, at a position where the old one's selection would still serve."""
    config = DecodeSelection(METHODS["low_rank"][0], **SMALL, refresh=REFRESH)
    steps = Steps(22, config)
    before = steps.run(steps.nothing, range(3))[1]
    stale, fresh = (steps.run(state, range(3, 5))[0] for state in (before, steps.nothing))
    assert np.abs(stale - fresh)[:, 1].max() > 1e-3
    rows = Rows(steps.slot[1:2].astype(jnp.int32), jnp.array([96], jnp.int32), jnp.array([133], jnp.int32))
    queries = jnp.asarray(steps.query[1:2])
    _, state = jax.jit(lambda state: attend_and_keep(prompt, steps.call(queries, rows, state)))(before)
    slot = int(steps.slot[1])
    for name, x in state.items():
        assert not np.asarray(x[slot]).any()
        kept = np.arange(x.shape[0]) != slot
        np.testing.assert_array_equal(np.asarray(x)[kept], np.asarray(before[name])[kept])
    np.testing.assert_array_equal(steps.run(state, range(3, 5))[0][:, 1], fresh[:, 1])


@XLA_IS_SLOW
def test_a_selection_of_another_position_is_not_taken() -> None:
    config = DecodeSelection(METHODS["low_rank"][0], **SMALL, refresh=REFRESH)
    steps = Steps(24, config)
    at_10 = steps.run(steps.nothing, range(10, 11))[1]
    expected = steps.run(steps.nothing, range(2, 3))[0]
    np.testing.assert_array_equal(steps.run(at_10, range(2, 3))[0], expected)


def test_both_forms_keep_and_give_the_same(form: str) -> None:
    if form == "xla":
        pytest.skip("compares with the native kernels")
    config = DecodeSelection(METHODS["low_rank"][0], **SMALL, refresh=REFRESH)
    steps = Steps(25, config, page=128)

    @jax.jit
    def both(query: jax.Array, rows: Rows, state: Any) -> Any:
        call = steps.call(query, rows, state)
        states = [config.renewed(call, in_kernel=in_kernel) for in_kernel in (False, True)]
        in_xla = config.attend(call._replace(rows=rows.settled(), state=states[0]))
        return states, in_xla, config.attend_in_kernel(call._replace(state=states[1]))

    state = steps.nothing
    for step in range(2 * REFRESH):
        query = jnp.asarray(steps.query[:, :, step : step + 1])
        (of_xla, state), in_xla, in_kernel = both(query, steps.rows(step), state)
        for name, x in of_xla.items():
            np.testing.assert_array_equal(state[name], x, err_msg=name)
        np.testing.assert_allclose(in_kernel, in_xla, atol=3e-6)


def test_a_budget_for_every_key_keeps_nothing() -> None:
    config = DecodeSelection(METHODS["low_rank"][0], **{**SMALL, "budget": KEYS}, refresh=REFRESH)
    steps = Steps(26, config)
    found, state = steps.run(steps.nothing, range(3))
    exact = replace(steps.config, crossover=KEYS)
    np.testing.assert_allclose(found, Steps(26, exact).expected(low_rank)[:3], atol=3e-6)
    assert not any(np.asarray(x).any() for x in state.values())


def test_a_layer_keeps_state_where_it_selects() -> None:
    config = DecodeSelection("low_rank", exact_layers=2, refresh=8)
    plan = Plan(decode=config)
    assert [set(plan.state(layer, 3)) for layer in (1, 2)] == [set(), {"chosen_blocks", "chosen_counts", "chosen_seen"}]
    assert plan.state(2, 3)["chosen_blocks"].shape == (3, config.most_blocks)
    assert not Plan(decode=replace(config, refresh=1)).state(2, 3)
    assert not Plan(TwoStage()).state(2, 3)


def test_sums_of_values_are_those_of_the_values() -> None:
    config = DecodeSelection("sparq", reallocate=True)
    runs = np.random.default_rng(14).standard_normal((2, 3, 64, HEAD_DIM)).astype(np.float32)
    found = config.entries("value_sum", jnp.asarray(runs), {})
    np.testing.assert_allclose(found, runs.sum(axis=2), atol=1e-5)
    assert config.fields(HEAD_DIM)["value_sum"].of_values


def test_no_key_exceeds_quests_bound() -> None:
    rng = np.random.default_rng(15)
    key, query = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 20, 16, HEAD_DIM), (2, 1, 4, HEAD_DIM))
    )
    method = PageBound()
    entries = method.entries("page_bound", jnp.asarray(key), {})
    features = method.ranking_queries(jnp.asarray(query), jnp.ones((2, 1, 4), bool), {}).features
    for head in range(2):
        bound = np.asarray(method.block_products(features[head, 0], {"page_bound": entries[head][:, None]}))
        largest = np.einsum("bkd,qd->bqk", key[head], query[head, 0]).max(axis=2)
        assert (bound > largest - 0.05).all(), "but for the rounding to bfloat16"
        assert (bound < np.abs(key[head]).max(axis=1) @ np.abs(query[head, 0]).T + 0.05).all()


@pytest.mark.slow
def test_prompts_may_rank_by_the_new_methods_too() -> None:
    """Blocks of queries, with entries shorter and longer than a key block."""
    query, key, value = map(jnp.asarray, random_inputs(16, 1, 4, 2, 256, 256, HEAD_DIM))
    rows = Rows.whole(jnp.array([256], jnp.int32))
    exact = attend(Exact(), query, key_view := KeyView(key, value), rows)
    for method in (PageBound(), Sparq(rank=12)):
        errors = []
        for budget in (64, 192):
            config = TwoStage(method, budget=budget, query_block=16, key_block=4, sink=4, local=4)
            found = jax.jit(partial(attend, config))(query, key_view, rows)
            errors.append(float(jnp.abs(found - exact)[:, :, 200:].mean()))
        assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nearest"}, "method is 'nearest', expected one of"),
        ({"budget": 79}, "budget is 79, but sink and local may force 80 keys"),
        ({"budget": 0}, "may force"),
        ({"mass": float("nan")}, "mass is nan"),
        ({"mass": 1.1}, "mass is 1.1"),
        ({"mass": -0.1}, "mass is -0.1"),
        ({"key_block": 12}, "key_block is 12, expected a power of two"),
        ({"key_block": 256}, "key_block is 256, expected at most 128"),
        ({"sink": -1}, "sink is -1"),
        ({"local": -1}, "local is -1"),
        ({"exact_layers": -1}, "exact_layers is -1"),
        ({"crossover": -1}, "crossover is -1"),
        ({"sample": 1}, "sample is 1, expected 0, or at least 2"),
        ({"sample": -2}, "sample is -2"),
        ({"sample": 8, "reallocate": True}, "both stand in for the keys left out"),
        ({"refresh": 0}, "refresh is 0, expected a number of tokens >= 1"),
        ({"refresh": 2, "reallocate": True}, "refresh is 2 and reallocate is True"),
        ({"budget": 80, "refresh": 9}, "may force 80 keys, and refresh 9 may add 8: raise budget, or lower refresh"),
    ],
)
def test_configuration_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeSelection(**options)


def test_methods_refuse_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="bound is 'mean', expected one of: quest, cuboid_mean"):
        PageBound("mean")
    with pytest.raises(ValueError, match="rank is 0"):
        Sparq(rank=0)


def test_a_prompt_is_refused() -> None:
    query, key, value = map(jnp.asarray, random_inputs(17, 1, 4, 2, 3, KEYS, HEAD_DIM))
    rows = Rows(*(jnp.array([x], jnp.int32) for x in (0, KEYS - 3, KEYS)))
    with pytest.raises(ValueError, match="the call has 3 queries a head, but decode_selection is for new tokens"):
        attend(DecodeSelection("sparq", **SMALL), query, KeyView(key, value), rows)
    with pytest.raises(ValueError, match="prompt is a DecodeSelection, which is for new tokens only"):
        Plan(DecodeSelection())


def test_where_keys_are_not_all_those_before_it_is_exact() -> None:
    config = DecodeSelection(**SMALL)
    bias = jnp.zeros((4, 3))
    for mask in (Mask(window=64), Mask(causal=False), Mask(relative_bias=bias)):
        assert config.within(4096, mask) == Exact()
    assert config.within(48, Mask()) == Exact()
    assert config.within(49, Mask()) == config
    assert DecodeSelection(**SMALL, crossover=99).within(99, Mask()) == Exact()


def test_methods_have_key_blocks_of_their_own() -> None:
    found = {name: DecodeSelection(name).key_block for name in ("low_rank", "mean_pool", "page_bound", "sparq")}
    assert found == {"low_rank": 8, "mean_pool": 8, "page_bound": 16, "sparq": 1}
    assert DecodeSelection("sparq", key_block=8).key_block == 8


def test_a_plan_of_one_method_keeps_and_learns_once() -> None:
    prompt = TwoStage(LowRank(rank=8, query_share=0.25), key_block=16)
    plan = Plan(prompt, DecodeSelection(LowRank(rank=8)))
    assert plan.fields(64) == prompt.fields(64)
    assert prompt.rule == plan.decode.rule
    for method in (LowRank(rank=16), "page_bound"):
        other = DecodeSelection(method)
        assert other.rule != prompt.rule
    with pytest.raises(ValueError, match="which keep different things under one name"):
        Plan(prompt, DecodeSelection(LowRank(rank=16)))
    with pytest.raises(ValueError, match="the same key_block where it keeps key blocks"):
        Plan(TwoStage("page_bound"), DecodeSelection("page_bound"))
    with pytest.raises(ValueError, match="which keep different things under one name"):
        Plan(TwoStage(PageBound(), key_block=16), DecodeSelection(PageBound("cuboid_mean")))
    both = Plan(TwoStage("page_bound", key_block=16), DecodeSelection("sparq", reallocate=True))
    assert both.fields(64).keys() == {"page_bound", "key_components", "value_sum"}


def test_it_has_a_json_form() -> None:
    config = DecodeSelection(Sparq(rank=8), mass=0.9)
    found = json.loads(json.dumps(attention_to_dict(config)))
    assert found == {
        "kind": "decode_selection",
        "method": {"name": "sparq", "rank": 8},
        "budget": 1024,
        "mass": 0.9,
        "key_block": 1,
        "sink": 8,
        "local": 64,
        "exact_layers": 1,
        "crossover": 0,
        "sample": 0,
        "reallocate": False,
        "refresh": 1,
    }
    assert hash(DecodeSelection("sparq")) == hash(DecodeSelection(Sparq()))
