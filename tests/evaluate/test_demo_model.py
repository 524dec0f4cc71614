"""The demo model itself: it retrieves, and two-stage attention keeps what it retrieves, with questions all along."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

import iceformer
from iceformer.attention import Attention, Exact
from iceformer.deploy.calibration import calibrate, calibration_ids
from iceformer.evaluate.line_retrieval import make_record, pseudo_words
from iceformer.evaluate.retention import Task, retention
from iceformer.model.self_attention import LayerConstants

from ..few import few

FOLDER = Path(__file__).parents[2] / "demo" / "model"
TOKENS = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nnx.Module:
    return iceformer.load_model(iceformer.convert_checkpoint(FOLDER, tmp_path_factory.mktemp("demo") / "checkpoint"))


def right_answers(
    model: nnx.Module, attention: Attention, constants: LayerConstants | None, tasks: list[Task]
) -> list[bool]:
    graph, state = nnx.split(model)

    @jax.jit
    def choose(state: nnx.State, ids: jax.Array, lengths: jax.Array, constants: Any) -> jax.Array:
        return jnp.argmax(nnx.merge(graph, state)(ids, lengths, attention=attention, constants=constants), axis=-1)  # type: ignore[operator]

    right = []
    for task in tasks:
        ids = np.zeros((1, TOKENS), np.int32)
        ids[0, : len(task.ids)] = task.ids
        chosen = np.asarray(choose(state, ids, np.array([len(task.ids)], np.int32), constants))[0]
        right += [all(chosen[i - 1] == task.ids[i] for i in answer) for answer in task.answers]
    return right


@pytest.mark.parametrize("calibration", few(["default text", "random ids"], ["default text"]))
def test_an_eighth_of_the_context_keeps_the_answers(model, calibration: str) -> None:
    tokenizer = FOLDER / "tokenizer.json"
    rng = np.random.default_rng(5)
    words = pseudo_words(rng, 2000)
    tasks = [Task.of(make_record(rng, 55, words, asked=0.8), Tokenizer.from_file(str(tokenizer))) for _ in range(4)]
    assert all(TOKENS * 0.6 < len(task.ids) <= TOKENS for task in tasks)
    attention = iceformer.TwoStage(budget=TOKENS // 8, exact_last_block=False)
    source = None if calibration == "default text" else rng.integers(0, model.config.vocab_size, TOKENS)
    ids, _ = calibration_ids(source, tokenizer, model.config.vocab_size, TOKENS)
    constants = calibrate(model, [attention], ids[None], ids.size, longest=ids.size)
    exact = right_answers(model, Exact(), None, tasks)
    assert len(exact) > 100
    assert np.mean(exact) > 0.9
    assert retention(exact, right_answers(model, attention, constants, tasks)) > 0.97
