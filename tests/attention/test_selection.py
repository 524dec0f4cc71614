"""Selection and its configuration: ties, forced members, too few visible, and what a configuration refuses."""

import json

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iceformer.attention import METHODS, Auto, Exact, LowRank, TwoStage, attention_to_dict, make_method
from iceformer.attention.selection import select


@settings(max_examples=60, deadline=None)
@given(
    importance=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0]), min_size=24, max_size=24),
    forced=st.sets(st.integers(0, 23), max_size=6),
    visible=st.sets(st.integers(0, 23)),
    count=st.sampled_from([1, 8, 24]),
)
def test_select_takes_forced_then_best_with_ties_to_the_lower_index(importance, forced, visible, count) -> None:
    ranked = sorted(visible, key=lambda i: (i not in forced, 0 if i in forced else -importance[i], i))[:count]
    chosen, chosen_visible = select(
        jnp.asarray(importance),
        jnp.asarray([i in forced for i in range(24)]),
        jnp.asarray([i in visible for i in range(24)]),
        count,
    )
    assert [int(i) for i, good in zip(chosen, chosen_visible, strict=True) if good] == ranked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": (256, 1024), "mass": 0.0}, "only by mass"),
        ({"budget": (1024, 256), "mass": 0.9}, "a least that is not above the most"),
        ({"budget": (0, 1024), "mass": 0.9}, "at least 1 key"),
        ({"mass": 1.0}, "mass is 1.0"),
        ({"mass": -0.1}, "mass is -0.1"),
        ({"mass": float("nan")}, "mass is nan"),
        ({"budget": 100, "query_block": 64}, "may force"),
        ({"budget": 40}, "may force"),
        ({"query_block": 48}, "power of two"),
        ({"key_block": 0}, "power of two"),
        ({"candidates": 0.5}, "candidates is 0.5"),
        ({"sink": -1}, "sink is -1"),
        ({"compensation": "mean"}, "compensation is 'mean'"),
        ({"crossover": -1}, "crossover is -1"),
        ({"method": "nearest"}, "method is 'nearest', expected one of: antidiagonal, .*, low_rank, "),
    ],
)
def test_configuration_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStage(**options)


def test_a_measured_crossover_is_not_given() -> None:
    with pytest.raises(ValueError, match="crossover is 64, but Auto measures it"):
        Auto(TwoStage(crossover=64))


def test_by_mass_the_budget_is_a_least_and_a_most() -> None:
    config = TwoStage(mass=0.9, budget=(300, 2000))
    assert (config.least_keys, config.most_keys, config.exact_keys) == (300, 2000, 300)
    config = TwoStage(mass=0.9, budget=2000)
    assert (config.least_keys, config.most_keys) == (512, 2000)
    assert TwoStage(mass=0.9, budget=400).least_keys == 400
    assert config.method == LowRank(query_share=1.0)
    config = TwoStage(budget=2000)
    assert (config.least_keys, config.most_keys, config.exact_keys) == (2000, 2000, 2000)
    read = json.loads(json.dumps(attention_to_dict(TwoStage(mass=0.9, budget=(300, 2000)))))
    assert (read["budget"], read["mass"]) == ([300, 2000], 0.9)


@pytest.mark.parametrize(("budget", "query_block", "local"), [(64, 8, 2), (1023, 64, 16), (4096, 128, 32)])
def test_the_query_block_follows_a_small_budget(budget, query_block, local) -> None:
    config = TwoStage(budget=budget)
    assert (config.query_block, config.local) == (query_block, local)


def test_methods_refuse_options_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="does not take"):
        make_method("mean_pool", rank=4)
    with pytest.raises(ValueError, match="rank is 0"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="query_share is 0"):
        LowRank(query_share=0.0)


def test_low_rank_without_projections_says_so() -> None:
    with pytest.raises(ValueError, match="needs the constant query_projection"):
        LowRank().ranking_queries(jnp.zeros((1, 1, 4, 8)), jnp.ones((1, 1, 4), bool), {})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_configurations_are_values(name) -> None:
    config = TwoStage(method=name, budget=1024)
    assert config == TwoStage(method=make_method(name), budget=1024)
    assert hash(config) == hash(TwoStage(method=make_method(name), budget=1024))
    assert json.loads(json.dumps(attention_to_dict(config)))["method"]["name"] == name
    assert attention_to_dict(Exact())["kind"] == "exact"
