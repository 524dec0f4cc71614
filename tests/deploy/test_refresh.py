"""An artifact whose new tokens keep a selection for some steps, against a loop over the model in JAX."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import iceformer
from iceformer.attention import DecodeSelection, KVCache, Rows
from iceformer.deploy.entries import DecoderEntries
from iceformer.deploy.session import Session

from ..few import few
from .conftest import REFRESHING

NEW = 12


class Loop:
    """Greedy tokens of one row after another, each from an empty cache."""

    def __init__(self, checkpoint: Path, artifact: Path, session: Session) -> None:
        self._model: Any = iceformer.load_model(checkpoint)
        info = session.info
        entries = dataclasses.replace(DecoderEntries.of(self._model, None), plan=REFRESHING)
        self._layers = entries.cache(info.buckets[0].capacity, 2, "float32", 0).layers
        self._constants: list[dict[str, jax.Array]] = [{}, {}]
        for name, array in load_file(artifact / info.weights.file.path).items():
            if name.startswith("attention."):
                _, layer, constant = name.split(".")
                self._constants[int(layer)][constant] = jnp.asarray(array)
        self._step = jax.jit(self._run, static_argnames="decoding")

    def _run(self, cache: KVCache, ids: jax.Array, rows: Rows, decoding: bool) -> Any:
        hidden, cache = self._model.hidden_states(
            ids, rows, plan=REFRESHING, decoding=decoding, cache=cache, constants=tuple(self._constants)
        )
        return jnp.argmax(self._model.logits(hidden[0, -1])), cache

    def generate(self, ids: np.ndarray) -> list[int]:
        cache: Any = tuple({name: jnp.zeros(x.shape, x.dtype) for name, x in layer.items()} for layer in self._layers)
        written, start = [], 0
        tokens = jnp.asarray(ids[None], jnp.int32)
        for _ in range(NEW):
            end = start + tokens.shape[1]
            rows = Rows(*(jnp.array([x], jnp.int32) for x in (1, start, end)))
            token, cache = self._step(cache, tokens, rows, start > 0)
            written.append(int(token))
            tokens, start = token[None, None].astype(jnp.int32), end
        return written


@pytest.mark.parametrize("page", few([None, 128], [None]))
def test_a_kept_selection_writes_what_the_model_writes(
    checkpoint: Path, refreshing_artifact: Path, tmp_path: Path, page: int | None
) -> None:
    """Two rows at a time, in slots that rows take over where a selection of the one before would serve."""
    artifact = refreshing_artifact
    if page:
        artifact = iceformer.compile(
            checkpoint, tmp_path / "a", buckets=(256,), chunk=64, batch=2, page=page, attention=REFRESHING
        )
    session = iceformer.load(artifact)
    layers = session.info.buckets[0].cache.layers
    state = {"chosen_blocks", "chosen_counts", "chosen_seen"}
    assert [layer.keys() & state for layer in layers] == [set(), state]
    decode = REFRESHING.decode
    assert isinstance(decode, DecodeSelection)
    assert layers[1]["chosen_blocks"].shape == (2, 2, decode.most_blocks)
    assert session.info.buckets[0].plan["decode"]["refresh"] == decode.refresh
    loop, rng = Loop(checkpoint, artifact, session), np.random.default_rng(0)
    prompts = [rng.integers(4, 288, length) for length in (90, 61, 102, 18, 101, 74)]
    for two in (prompts[:2], prompts[2:4], prompts[4:]):
        streams = [session.generate(prompt, NEW, stream=True) for prompt in two]
        list(itertools.zip_longest(*streams))
        for prompt, stream in zip(two, streams, strict=True):
            found = stream.generation
            assert found is not None
            assert found.ids.tolist() == loop.generate(prompt)[: found.ids.size]
            assert found.ids.size == NEW or found.finish_reason == "stop"
