"""`session.encode` of tiny random BERTs against transformers, and what it refuses."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import iceformer
from iceformer.attention import LowRank
from iceformer.deploy import artifact as layout
from iceformer.deploy.encoding import Encoding
from iceformer.deploy.executables import PortableTierWarning
from iceformer.deploy.session import Session
from iceformer.model.encoder import Encoder

from ..few import few
from ..model.reference import save_random

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "foxes", "count", "the", "stars", "at", "night"]
TINY: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LABELS = {0: "calm", 1: "glad", 2: "sad"}
LENGTHS = (40, 1, 64, 7, 65, 100, 33)
"""More rows than two calls take, for both buckets."""
TOLERANCE = 1e-4
TWO_STAGE = iceformer.TwoStage(
    method=LowRank(rank=4), budget=48, query_block=8, key_block=2, sink=4, local=4, exact_last_block=False
)


def save(folder: Path, auto_class: str, **config: Any) -> Any:
    """Saves a random BERT with a tokenizer of whole words, and returns it in transformers."""
    import transformers

    reference = save_random(folder, "bert", auto_class=getattr(transformers, auto_class), **{**TINY, **config})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # A session cuts nothing off, whatever the file says.
    tokenizer.enable_truncation(6)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """`made(auto_class, config..., compile=options)`: the reference and the artifact of a model, made once."""
    known: dict[str, tuple[Any, Path]] = {}

    def make(auto_class: str, *, options: dict[str, Any] | None = None, **config: Any) -> tuple[Any, Path]:
        options = {"buckets": (64, 128), "batch": 2, "attention": iceformer.Exact(), **(options or {})}
        key = repr((auto_class, config, options))
        if key not in known:
            folder = tmp_path_factory.mktemp("encoder")
            reference = save(folder / "source", auto_class, **config)
            checkpoint = iceformer.convert_checkpoint(folder / "source", folder / "checkpoint")
            known[key] = reference, iceformer.compile(checkpoint, folder / "artifact", **options)
        return known[key]

    return make


@pytest.fixture(scope="module")
def features(made: Callable[..., tuple[Any, Path]]) -> tuple[Any, Session]:
    """A model without task head, in both buckets, two rows a call."""
    reference, path = made("AutoModel")
    return reference, iceformer.load(path)


def random_ids(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(length).integers(0, TINY["vocab_size"], length)


def expected(reference: Any, ids: Any, **inputs: Any) -> Any:
    """The reference's outputs for one row alone."""
    with torch.no_grad():
        return reference(
            torch.tensor(np.asarray(ids))[None],
            **{name: torch.tensor(array)[None] for name, array in inputs.items()},
        )


def close(ours: NDArray[np.float32] | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("tier", few(["native", "portable"], ["native"]))
def test_a_ragged_list_equals_transformers(
    made: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    reference, path = made("AutoModel")
    if tier == "portable":
        monkeypatch.setattr(layout, "differences", lambda *_: ["made up"])
    with pytest.warns(PortableTierWarning) if tier == "portable" else nullcontext():
        session = iceformer.load(path)
    assert session.tier == tier
    rows = [random_ids(length) for length in LENGTHS]
    encodings = session.encode(rows)
    assert [encoding.tokens for encoding in encodings] == list(LENGTHS)
    for encoding, ids in zip(encodings, rows, strict=True):
        outputs = expected(reference, ids)
        close(encoding.last_hidden_state, outputs.last_hidden_state)
        close(encoding.pooled, outputs.pooler_output)
        np.testing.assert_array_equal(encoding.ids, ids)
        assert (encoding.logits, encoding.label, encoding.offsets) == (None, None, None)


def test_rows_run_in_the_smallest_bucket_that_holds_them(
    features: tuple[Any, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, seen = features[1], []
    call = session._runner.call

    def watched(bucket: Any, name: str, *arrays: Any) -> Any:
        seen.append((bucket.capacity, arrays[-1].tolist()))
        return call(bucket, name, *arrays)

    monkeypatch.setattr(session._runner, "call", watched)
    done: list[tuple[int, int]] = []
    session.encode([random_ids(n) for n in LENGTHS], progress=lambda *counts: done.append(counts))
    assert seen == [(128, [100, 65]), (64, [64, 40]), (64, [33, 7]), (64, [1, 0])]
    assert done == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_one_bucket_of_the_whole_length_without_cache(made: Callable[..., tuple[Any, Path]]) -> None:
    info = iceformer.load(made("AutoModel")[1]).info
    assert (info.model.kind, info.model.task, info.model.labels) == ("encoder", "features", ())
    assert (info.model.max_tokens, info.model.fixed_tokens, info.model.vocab_size) == (256, None, 90)
    for bucket, capacity in zip(info.buckets, (64, 128), strict=True):
        assert (bucket.chunk, bucket.cache.size_in_bytes) == (capacity, 0)
        entry = bucket.entries["encode"]
        assert {name: array.shape for name, array in entry.arguments.items()} == {
            "input_ids": (2, capacity),
            "token_type_ids": (2, capacity),
            "lengths": (2,),
        }
        assert {name: array.shape for name, array in entry.results.items()} == {
            "last_hidden_state": (2, capacity, 48),
            "pooled": (2, 48),
        }


def test_texts_and_pairs(features: tuple[Any, Session]) -> None:
    reference, session = features
    text, other = "small foxes count the stars at night", "the stars count foxes"
    one = session.encode(text)
    assert one.ids is not None
    assert one.ids.tolist() == [2, 5, 6, 7, 8, 9, 10, 11, 3]
    assert one.offsets is not None
    assert [text[slice(*offsets)] for offsets in one.offsets] == ["", *text.split(), ""]
    close(one.pooled, expected(reference, one.ids).pooler_output)
    pair, alone = session.encode([(text, other), text])  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert pair.sequence.tolist() == [-1, *[0] * 7, -1, *[1] * 4, -1]
    close(pair.pooled, expected(reference, pair.ids, token_type_ids=[0] * 9 + [1] * 5).pooler_output)
    assert one.pooled is not None
    np.testing.assert_allclose(alone.pooled, one.pooled, atol=1e-6)


def test_arrays_by_name(features: tuple[Any, Session]) -> None:
    reference, session = features
    ids, types = random_ids(20), np.arange(20) // 10
    theirs = expected(reference, ids, token_type_ids=types).pooler_output
    close(session.encode({"input_ids": ids, "token_type_ids": types}).pooled, theirs)
    batch = session.encode({"input_ids": [ids, ids[:5]], "token_type_ids": [types, types[:5]]})
    assert [encoding.tokens for encoding in batch] == [20, 5]
    close(batch[0].pooled, theirs)
    (row,) = session.encode({"input_ids": ids[None]})
    close(row.pooled, expected(reference, ids).pooler_output)


def test_only_what_is_asked_for_is_kept(features: tuple[Any, Session]) -> None:
    encoding = features[1].encode([5, 6, 7], outputs=("pooled",))
    assert encoding.last_hidden_state is None
    assert encoding.pooled is not None
    with pytest.raises(ValueError, match="outputs names logits, but the model returns last_hidden_state, pooled"):
        features[1].encode([5], outputs=("logits",))


@pytest.mark.parametrize(
    ("auto_class", "task"),
    [
        ("AutoModelForMaskedLM", "masked_lm"),
        pytest.param("AutoModelForSequenceClassification", "sequence_classification", marks=pytest.mark.slow),
        pytest.param("AutoModelForTokenClassification", "token_classification", marks=pytest.mark.slow),
        ("AutoModelForQuestionAnswering", "question_answering"),
    ],
)
def test_task_heads_equal_transformers(made: Callable[..., tuple[Any, Path]], auto_class: str, task: str) -> None:
    labels = {} if task in ("masked_lm", "question_answering") else {"id2label": LABELS}
    reference, path = made(auto_class, options={"buckets": (64,)}, **labels)
    session = iceformer.load(path)
    assert session.info.model.task == task
    ids = random_ids(41)
    encoding: Encoding = session.encode([ids, random_ids(9)])[0]
    outputs = expected(reference, ids)
    logits = (
        torch.stack([outputs.start_logits, outputs.end_logits], -1) if task == "question_answering" else outputs.logits
    )
    close(encoding.logits, logits)
    best = logits[0].argmax(-1)
    if task == "sequence_classification":
        assert encoding.label == LABELS[int(best)]
    elif task == "token_classification":
        assert encoding.label == [LABELS[int(index)] for index in best]
    else:
        assert (encoding.labels, encoding.label) == ((), None)


def test_two_stage_is_near_exact(made: Callable[..., tuple[Any, Path]]) -> None:
    """Equal where the budget covers the row; near and no longer equal where it does not; equal to the model itself."""
    _, path = made("AutoModel", options={"buckets": (128,), "attention": TWO_STAGE})
    exact = iceformer.load(made("AutoModel")[1])
    session = iceformer.load(path)
    calibration = session.info.provenance.calibration
    assert calibration is not None
    assert (calibration.kind, calibration.tokens) == ("default text", 256)
    rows = [random_ids(40), random_ids(120)]
    (short, long), (short_exact, long_exact) = session.encode(rows), exact.encode(rows)
    assert short.last_hidden_state is not None
    assert long.last_hidden_state is not None
    assert short_exact.last_hidden_state is not None
    assert long_exact.last_hidden_state is not None
    np.testing.assert_allclose(short.last_hidden_state, short_exact.last_hidden_state, atol=TOLERANCE)
    difference = np.abs(long.last_hidden_state - long_exact.last_hidden_state)
    assert 1e-4 < difference.mean() < long_exact.last_hidden_state.std() / 2

    model = iceformer.load_model(path.parent / "checkpoint")
    assert isinstance(model, Encoder)
    weights = layout.open_artifact(path).path / layout.WEIGHTS
    from safetensors.numpy import load_file

    stored = load_file(weights)
    names = ("query_projection", "key_projection")
    constants = tuple(
        {name: jax.numpy.asarray(stored[f"attention.{layer}.{name}"]) for name in names} for layer in range(2)
    )
    graph, state = nnx.split(model)
    ids = np.zeros((1, 128), np.int32)
    ids[0, :120] = rows[1]

    @jax.jit
    def run(state: Any, ids: jax.Array) -> dict[str, jax.Array]:
        inputs = {"input_ids": ids, "token_type_ids": jax.numpy.zeros_like(ids)}
        lengths = jax.numpy.array([120])
        return nnx.merge(graph, state).encode(inputs, lengths, attention=TWO_STAGE, constants=constants)

    direct = np.asarray(run(state, ids)["last_hidden_state"])[0, :120]
    np.testing.assert_allclose(long.last_hidden_state, direct, atol=1e-3)


def test_bfloat16_gives_float32_near_float32(made: Callable[..., tuple[Any, Path]]) -> None:
    reference, path = made("AutoModel", options={"buckets": (64,), "dtype": "bfloat16"})
    session = iceformer.load(path)
    assert session.info.buckets[0].entries["encode"].results["last_hidden_state"].dtype == "bfloat16"
    found = session.encode(random_ids(30)).last_hidden_state
    theirs = expected(reference, random_ids(30)).last_hidden_state[0].numpy()
    assert found is not None
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - theirs).mean() < theirs.std() / 20


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the input is empty, expected at least one token"),
        ([[4, 5], []], "input 1 is empty"),
        ([4, 90], "the input has token id 90 at position 1, expected ids from 0 to 89"),
        ("foxes " * 127, "the input has 129 tokens and the largest bucket takes 128: shorten it, or compile"),
        (["foxes", "foxes " * 300], "input 1 has 302 tokens"),
        (np.ones((2, 3), np.int32), r"shape \(2, 3\)"),
        ({"pixel_values": np.ones(3)}, r"has pixel_values, but the model takes input_ids \[tokens\], token_type_ids"),
        ({"input_ids": [5, 6], "token_type_ids": [0]}, r"token_type_ids of shape \(1,\) .* expected integers of shape"),
        ({"input_ids": [5, 6], "token_type_ids": [0, 2]}, "token type 2 at position 1, expected types from 0 to 1"),
        (
            {"input_ids": [[5], [6]], "token_type_ids": [[0]]},
            "2 of input_ids, 1 of token_type_ids, expected the same number",
        ),
        (("a", "b", "c"), "the input is a tuple with texts, expected one text, or token ids"),
    ],
)
def test_refuses(features: tuple[Any, Session], inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features[1].encode(inputs)


def test_each_kind_says_what_it_can_do(features: tuple[Any, Session], exact_session: Session) -> None:
    with pytest.raises(ValueError, match=r"holds a decoder \(llama\): it can only score and generate"):
        exact_session.encode("Once")
    for call in (features[1].generate, features[1].score):
        with pytest.raises(ValueError, match=r"holds an? encoder \(bert\): it can only encode"):
            call([5, 6])


def test_card_and_tables_are_an_encoders(made: Callable[..., tuple[Any, Path]]) -> None:
    path = made("AutoModelForSequenceClassification", options={"buckets": (64,)}, id2label=LABELS)[1]
    card = (path / "README.md").read_text()
    assert "session.encode(" in card
    assert "iceformer encode artifact" in card
    assert "into 3 classes: calm, glad, sad" in card
    assert "generate" not in card
    assert "prompt" not in card


@pytest.mark.parametrize(
    ("model", "buckets", "expected"),
    [
        pytest.param({"max_position_embeddings": 64}, None, [64], marks=pytest.mark.slow),
        ({"max_position_embeddings": 200}, None, [128, 200]),
        ({"max_position_embeddings": 200}, (50, 99), [50, 99]),
    ],
)
def test_buckets_end_where_the_model_does(
    made: Callable[..., tuple[Any, Path]], model: dict[str, int], buckets: Any, expected: list[int]
) -> None:
    path = made("AutoModel", options={"buckets": buckets, "batch": 1}, num_hidden_layers=1, **model)[1]
    assert [bucket.capacity for bucket in iceformer.load(path).info.buckets] == expected
