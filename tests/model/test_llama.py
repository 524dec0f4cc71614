"""Llama's config, and its module in pieces: caches, queries and keys, attention given as an argument."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import iceformer
from iceformer.attention import KVCache, Plan, Rows
from iceformer.model.decoder import CausalLM
from iceformer.model.llama import LlamaConfig, LlamaForCausalLM
from iceformer.model.registry import build
from iceformer.model.rope import Rope

from .forward import forward, load_decoder
from .reference import shared_fields


def token_ids(model: CausalLM, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, model.config.vocab_size, shape), jnp.int32)


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig as Reference

    config, reference = LlamaConfig.from_hf({}), Reference()
    for name in shared_fields(LlamaConfig):
        assert getattr(config, name) == getattr(reference, name), name
    assert config.ropes == (Rope("default", 10000.0),) * 32
    assert config.windows == (None,) * 32


def test_null_fields_take_their_defaults() -> None:
    nulls = dict.fromkeys((*(each.name for each in dataclasses.fields(LlamaConfig)), "rope_scaling", "sliding_window"))
    assert LlamaConfig.from_hf(nulls) == LlamaConfig.from_hf({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish', supported: gelu"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads, 5"),
        ({"num_attention_heads": 24, "hidden_size": 100}, "hidden_size is 100, expected a multiple"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim is 2"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(fields)


def test_registry() -> None:
    assert build({"model_type": "llama"})[0].module is LlamaForCausalLM
    assert build({"architectures": ["LlamaForCausalLM"]})[0].module is LlamaForCausalLM
    for config in (
        {},
        {"architectures": 5},
        {"model_type": "mamba"},
        {"model_type": "mamba", "architectures": ["LlamaForCausalLM"]},
    ):
        with pytest.raises(ValueError, match=r"supported model types: .*\bllama\b"):
            build(config)


def test_chunks_with_a_cache_equal_one_call(tmp_path: Path, save_llama: Callable[..., Any]) -> None:
    """Prefill in chunks and decode token by token, with ragged rows and frequencies that follow the rows' lengths."""
    rope = {"rope_type": "dynamic", "factor": 2.0}
    save_llama(tmp_path / "source", rope_parameters=rope, max_position_embeddings=8)
    model = load_decoder(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    config, lengths = model.config, jnp.array([18, 13])
    ids = token_ids(model, 2, 18)
    expected = forward(model, ids, lengths)
    empty = jnp.zeros((2, config.num_key_value_heads, 24, config.head_dim))
    cache: KVCache = ({"key": empty, "value": empty},) * config.num_hidden_layers
    graph, state = nnx.split(model)

    @jax.jit
    def step(state: nnx.State, ids: jax.Array, offset: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        merged = nnx.merge(graph, state)
        rows = Rows(jnp.arange(2, dtype=jnp.int32), offset, lengths)
        hidden, cache_after = merged.hidden_states(ids, rows, plan=Plan(), cache=cache)
        assert cache_after is not None
        return merged.logits(hidden), cache_after

    start = 0
    for tokens in (8, 8, 1, 1):
        offset = jnp.full((2,), start, jnp.int32)
        logits, cache = step(state, ids[:, start : start + tokens], offset, cache)
        for row, length in enumerate(lengths.tolist()):
            valid = slice(0, max(min(tokens, length - start), 0))
            np.testing.assert_allclose(logits[row, valid], expected[row, start : start + tokens][valid], atol=1e-4)
        start += tokens
    assert start == 18


def test_padding_and_neighbours_change_nothing(tiny_checkpoint: Path) -> None:
    model = load_decoder(tiny_checkpoint)
    ids = token_ids(model, 2, 20)
    ids = jnp.stack([ids[0], ids[0].at[11:].set(7), ids[1]])
    logits = forward(model, ids, jnp.array([11, 11, 20]))
    np.testing.assert_array_equal(logits[0, :11], logits[1, :11])
    np.testing.assert_allclose(forward(model, ids[:1, :11])[0], logits[0, :11], atol=1e-5)


def test_an_id_outside_of_the_vocabulary_shows(tiny_checkpoint: Path) -> None:
    model = load_decoder(tiny_checkpoint)
    assert np.isnan(forward(model, jnp.array([[1, model.config.vocab_size]]))[0, 1]).all()


def test_attention_is_an_argument(tiny_checkpoint: Path) -> None:
    model = load_decoder(tiny_checkpoint)
    ids = token_ids(model, 1, 256)
    selective = {"method": "mean_pool", "query_block": 16, "key_block": 4, "sink": 4, "local": 8}
    exact = forward(model, ids)
    whole = forward(model, ids, attention=iceformer.TwoStage(budget=256, **selective))
    sparse = forward(model, ids, attention=iceformer.TwoStage(budget=64, exact_last_block=False, **selective))
    np.testing.assert_allclose(whole, exact, atol=1e-4)
    np.testing.assert_allclose(sparse[:, :60], exact[:, :60], atol=1e-3)
    assert np.isfinite(sparse).all()
    assert np.abs(sparse - exact)[:, 128:].max() > 1e-2


def test_queries_and_keys_equal_transformers(
    tmp_path: Path, save_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers.models.llama import modeling_llama

    reference = save_llama(tmp_path / "source", attention_bias=True)
    model = load_decoder(iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint"))
    expected = []
    eager = modeling_llama.eager_attention_forward

    def record(module: Any, query: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        expected.append((query.numpy(), key.numpy()))
        return eager(module, query, key, *arguments, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", record)
    reference.set_attn_implementation("eager")
    ids = token_ids(model, 2, 19)
    with torch.no_grad():
        reference(torch.from_numpy(np.array(ids)).long())
    graph, state = nnx.split(model)
    collected = jax.jit(lambda state: nnx.merge(graph, state).queries_and_keys(ids, jnp.array([19, 19])))(state)
    assert len(collected) == len(expected) == model.config.num_hidden_layers
    for ours, theirs in zip(collected, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)
