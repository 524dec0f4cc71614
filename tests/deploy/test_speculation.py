"""Checking guessed tokens changes nothing of what is written, nor of the cache; and it pays, or is not done."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import iceformer
from iceformer.attention import DecodeSelection, Plan
from iceformer.deploy import engine as engine_module
from iceformer.deploy.artifact import open_artifact
from iceformer.deploy.engine import Engine, Request, RequestLost, TokenWritten
from iceformer.deploy.manifest import CHECKED_ROWS
from iceformer.deploy.prefix_cache import PrefixCache
from iceformer.deploy.runner import Runner
from iceformer.deploy.sampling import Sampling
from iceformer.deploy.session import Session
from iceformer.deploy.speculation import CallCosts, Guesser, most_guesses, share_rows
from iceformer.model.products import FEW_ROWS

from ..few import few
from ..model.cases import DECODERS
from ..model.reference import save_random
from .conftest import REFRESHING, SELECTION, TWO_STAGE, VOCABULARY

NEW = 24
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"attention": iceformer.Exact()},
    "int8": {"attention": TWO_STAGE, "kv_dtype": "int8", "weights": "int8"},
    "bfloat16": {"attention": iceformer.Exact(), "dtype": "bfloat16"},
    "pages": {"attention": iceformer.Exact(), "page": 128, "batch": 2, "kv_dtype": "int8"},
    "six slots": {"attention": iceformer.Exact(), "batch": 6, "weights": "int8"},
    "selection": {"attention": Plan(decode=SELECTION)},
    "kept selection": {"attention": REFRESHING, "batch": 2},
    "kept selection, from 70 keys": {"attention": Plan(decode=replace(SELECTION, refresh=8, crossover=70))},
    "shared entries": {"attention": Plan(decode=DecodeSelection("page_bound", budget=48, key_block=8, local=8))},
    "reallocated": {"attention": Plan(decode=replace(SELECTION, reallocate=True))},
}


class Oracle(Guesser):
    """Guesses what is known to come, and spoils every guess with a probability, from a seed."""

    def __init__(self, whole: NDArray[np.int32], prompt_tokens: int, spoilt: float) -> None:
        super().__init__(whole[:prompt_tokens], len(whole) - prompt_tokens)
        self._whole = whole
        self._spoilt, self._rng = spoilt, np.random.default_rng(0)

    def guess(self, most: int) -> list[int]:
        right = self._whole[self._count : self._count + most]
        return [int(token) ^ int(self._rng.random() < self._spoilt) for token in right]

    def accept(self, token: int) -> None:
        assert token == self._whole[self._count]
        super().accept(token)


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[bytes, NDArray[np.int32]], float], None]:
    """Lets engines guess from whole texts, by their prompts, and check whatever there is room for."""

    def install(texts: dict[bytes, NDArray[np.int32]], spoilt: float) -> None:
        monkeypatch.setattr(
            engine_module, "Guesser", lambda ids, _: Oracle(texts[ids.tobytes()], len(ids), spoilt), raising=True
        )
        monkeypatch.setattr(
            engine_module, "share_rows", lambda guesses, rates, spare, _: share_rows(guesses, rates, spare, 0.0)
        )

    return install


def run(engine: Engine, requests: list[Request]) -> list[list[TokenWritten]]:
    """What is written of each request, without handles."""
    handles = [engine.add(request) for request in requests]
    written: dict[int, list[TokenWritten]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, RequestLost)
            if isinstance(event, TokenWritten):
                written[event.handle].append(replace(event, handle=0))
    return list(written.values())


def alike(events: list[list[TokenWritten]]) -> list[list[TokenWritten]]:
    """The same without what tells of guesses."""
    return [[replace(event, proposed=0, guessed=False) for event in row] for row in events]


def tokens_of(events: list[list[TokenWritten]]) -> list[list[int]]:
    return [[event.id for event in row] for row in events]


def logprobs_of(events: list[list[TokenWritten]]) -> list[float]:
    return [event.logprobs.logprob for row in events for event in row if event.logprobs]


def cache_bits(engine: Engine, tokens: int) -> Iterator[bytes]:
    """What the first slot's cache has of its first tokens; rings whole."""
    bucket = engine._info.buckets[0]
    for layer, window in zip(engine._runner.cache_views(bucket), bucket.cache.windows, strict=True):
        length = layer["key"].shape[2]
        for name, array in layer.items():
            if name in bucket.cache.state or window:
                yield array[0].tobytes()
            else:
                yield array[0, :, : tokens * array.shape[2] // length].tobytes()


def check(artifact_path: Path, requests: list[Request], guess: Any, spoilt: float, *, bits: bool = True) -> None:
    """Runs requests with and without guesses, and compares tokens, log-probabilities and the cache, to the bit.

    Without `bits`, tokens have to be the same, and log-probabilities nearly.
    """
    artifact = open_artifact(artifact_path)
    plain, guessing = Engine(Runner(artifact)), Engine(Runner(artifact))
    expected = run(plain, [replace(request, speculate=False) for request in requests])
    texts = {
        request.ids.tobytes(): np.concatenate([request.ids, np.array([event.id for event in row], np.int32)])
        for request, row in zip(requests, expected, strict=True)
    }
    guess(texts, spoilt)
    written = run(guessing, requests)
    if bits:
        assert alike(written) == expected
    assert tokens_of(written) == tokens_of(expected)
    np.testing.assert_allclose(logprobs_of(written), logprobs_of(expected), atol=2e-5)
    proposed = sum(event.proposed for row in written for event in row)
    guessed = sum(event.guessed for row in written for event in row)
    assert 0 < guessed <= proposed
    assert (guessed == proposed) == (spoilt == 0)
    if bits and len(requests) == 1:
        tokens = len(requests[0].ids) + len(expected[0]) - 1
        assert list(cache_bits(guessing, tokens)) == list(cache_bits(plain, tokens))


def requests(vocabulary: int, lengths: tuple[int, ...], temperature: float) -> list[Request]:
    return [
        Request(
            np.random.default_rng(length).integers(4, vocabulary, length).astype(np.int32),
            NEW,
            Sampling(temperature=temperature, seed=length, repetition_penalty=1.1),
            logprobs=2,
        )
        for length in lengths
    ]


@pytest.fixture(scope="module")
def artifacts(
    checkpoint: Path, refreshing_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("speculation")

    def artifact(name: str) -> Path:
        path = refreshing_artifact if name == "kept selection" else folder / name
        if not path.exists():
            iceformer.compile(checkpoint, path, buckets=(128,), chunk=32, **OPTIONS[name])
        return path

    return artifact


@pytest.mark.parametrize("name", few(OPTIONS, ("pages", "kept selection")))
@pytest.mark.parametrize("spoilt", [0.0, 0.4])
def test_the_same_text_and_cache(artifacts: Callable[[str], Path], guess: Any, name: str, spoilt: float) -> None:
    for length, temperature in ((61, 0.0), (90, 1.0)):
        check(artifacts(name), requests(VOCABULARY, (length,), temperature), guess, spoilt)


@pytest.mark.parametrize("name", few(["kept selection", "pages", "six slots"], ["kept selection", "pages"]))
def test_several_texts_at_once(artifacts: Callable[[str], Path], guess: Any, name: str) -> None:
    check(artifacts(name), requests(VOCABULARY, (61, 33, 100), 0.8), guess, 0.3)


@pytest.mark.parametrize("model_type", few(DECODERS, ("mixtral",)))
def test_every_family(model_type: str, tmp_path: Path, guess: Any) -> None:
    """Sliding windows whose rings turn, learned positions, experts.

    In Gemma 2 and 3, XLA rounds a norm that is added to the residual otherwise for one row than for several.
    """
    bits = model_type not in ("gemma2", "gemma3_text")
    save_random(tmp_path / "source", model_type, **DECODERS[model_type].tiny)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    artifact = iceformer.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", buckets=(96,), chunk=16, attention=iceformer.Exact()
    )
    vocabulary = open_artifact(artifact).manifest.model.vocab_size
    assert vocabulary is not None
    for spoilt in (0.0, 0.4):
        check(artifact, requests(vocabulary, (45,), 0.9), guess, spoilt, bits=bits)


@pytest.mark.parametrize("window", few([1, 2, 5], [2]))
def test_rings_shorter_than_a_check(window: int, tmp_path: Path, guess: Any) -> None:
    sizes: dict[str, Any] = DECODERS["mistral"].tiny | {"sliding_window": window, "num_hidden_layers": 2}
    save_random(tmp_path / "source", "mistral", **sizes)
    iceformer.convert_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    artifact = iceformer.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", buckets=(64,), chunk=16, attention=iceformer.Exact()
    )
    (bucket,) = open_artifact(artifact).manifest.buckets
    assert most_guesses(bucket, 10) == window - 1
    if window > 1:
        check(artifact, requests(200, (30,), 1.0), guess, 0.4)


def test_stop_strings_and_early_ends(exact_session: Session, guess: Any) -> None:
    prompt = exact_session.tokenize("Once upon a time")
    whole = exact_session.generate(prompt, NEW, speculate=False)
    guess({prompt.tobytes(): np.concatenate([prompt, whole.ids])}, 0.0)
    assert whole.text
    stop = whole.text[len(whole.text) // 2 :][:3]
    expected = exact_session.generate(prompt, NEW, speculate=False, stop=[stop])
    stream = exact_session.generate(prompt, NEW, stream=True, stop=[stop])
    pieces = list(stream)
    assert stream.generation is not None
    assert (stream.generation.text, stream.generation.finish_reason) == (expected.text, "stop")
    assert stream.generation.ids.tolist() == expected.ids.tolist() == [piece.id for piece in pieces]
    assert stream.generation.guessed_tokens == sum(piece.guessed for piece in pieces) > 0
    assert stream.generation.proposed_tokens >= stream.generation.guessed_tokens
    for most in (1, 2, 7):
        few_tokens = exact_session.generate(prompt, most)
        assert few_tokens.ids.tolist() == whole.ids.tolist()[:most]
        assert few_tokens.finish_reason == "length"
    longest = exact_session.generate(np.tile(prompt, 40)[:125], NEW, speculate=False)
    guess({np.tile(prompt, 40)[:125].tobytes(): np.concatenate([np.tile(prompt, 40)[:125], longest.ids])}, 0.0)
    again = exact_session.generate(np.tile(prompt, 40)[:125], NEW)
    assert (again.ids.tolist(), again.finish_reason) == (longest.ids.tolist(), "capacity")
    with pytest.raises(ValueError, match="speculate is 2"):
        exact_session.generate(prompt, 1, speculate=2)  # type: ignore[call-overload]


def test_a_prompt_behind_a_wrong_guess(exact_artifact: Path, guess: Any) -> None:
    """What wrong guesses wrote is not what the prefix cache keeps, nor what the slot's next prompt reads."""
    artifact = open_artifact(exact_artifact)
    first, second = requests(VOCABULARY, (70, 64), 0.0)
    second = replace(second, ids=np.concatenate([first.ids[:64], second.ids[:20]]))
    expected = run(Engine(Runner(artifact)), [replace(second, speculate=False)])
    row = run(Engine(Runner(artifact)), [replace(first, speculate=False)])[0]
    texts = {first.ids.tobytes(): [event.id for event in row], second.ids.tobytes(): [e.id for e in expected[0]]}
    guess(
        {ids: np.concatenate([np.frombuffer(ids, np.int32), new]).astype(np.int32) for ids, new in texts.items()}, 0.5
    )
    engine = Engine(Runner(artifact), PrefixCache(1 << 30))
    run(engine, [first])
    assert alike(run(engine, [second])) == expected


def test_a_session_guesses_by_itself(exact_session: Session) -> None:
    """A text that the model repeats without end, because nothing else is likely."""
    prompt, loop = [10, 11, 12, 13, 10, 11, 12], {10: 1e4}
    generation = exact_session.generate(prompt, 60, logit_bias=loop)
    assert generation.ids.tolist() == [10] * 60
    assert generation.proposed_tokens >= generation.guessed_tokens
    assert exact_session.generate(prompt, 60, logit_bias=loop, speculate=False).proposed_tokens == 0


def test_the_portable_tier_and_pure_xla_do_not_guess(exact_artifact: Path) -> None:
    artifact = open_artifact(exact_artifact)
    without = replace(artifact.manifest, environment=replace(artifact.manifest.environment, kernels=""))
    engine = Engine(Runner(replace(artifact, manifest=without)))
    (row,) = run(engine, requests(VOCABULARY, (40,), 0.0))
    assert not any(event.proposed for event in row)


def test_a_check_has_the_rows_that_the_kernels_multiply_at_once() -> None:
    assert CHECKED_ROWS == FEW_ROWS


def guesser(ids: list[int]) -> Guesser:
    return Guesser(np.array(ids, np.int32), 100)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 3, 1, 2, 4, 5, 1, 2], [4, 5, 1]),  # the last time
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # the longest match
        ([5, 6, 5, 6, 5, 6], [5, 6, 5]),  # on and on
        ([5, 5, 5], [5, 5, 5]),
        ([1, 2, 3, 2], []),  # one token is too little
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_guesses(ids: list[int], expected: list[int]) -> None:
    assert guesser(ids).guess(3) == expected
    assert guesser(ids).guess(1) == expected[:1]


def test_rates_follow_what_comes() -> None:
    text = guesser([1, 2, 3, 4, 5, 6, 7, 8] * 2)
    for token in [1, 2, 3, 4, 5, 6, 7, 8] * 2:
        assert text.guess(3)[0] == token
        text.accept(token)
    assert text.rate > 0.95
    for other in range(20, 40):
        for token in (1, 2):
            text.accept(token)
        assert text.guess(1)
        text.accept(other)
    assert text.rate < 0.1


def test_costs_are_medians_and_are_forgotten() -> None:
    costs = CallCosts()
    assert costs.ratio == 1.5
    for seconds in (0.1, 0.1, 9.0):
        costs.note(seconds, checked=False)
    assert costs.ratio == 1.5
    for seconds in (0.4, 0.3, 0.3):
        costs.note(seconds, checked=True)
    assert costs.ratio == pytest.approx(3.0)
    for _ in range(129):
        costs.note(0.1, checked=False)
    assert costs.ratio == 1.5


@pytest.mark.parametrize(
    ("lengths", "rates", "spare", "ratio", "expected"),
    [
        ([3], [0.9], 3, 2.0, [3]),
        ([3], [0.4], 3, 2.0, [0]),
        ([3], [0.4], 3, 1.5, [3]),
        ([3], [0.4], 3, 5.0, [0]),
        ([0], [0.9], 3, 1.0, [0]),
        ([3, 3], [0.9, 0.2], 2, 1.5, [2, 0]),
        ([3, 3], [0.8, 0.75], 2, 1.5, [1, 1]),
        ([3, 0], [0.9, 0.9], 2, 2.0, [0, 0]),
        ([1, 1], [0.9, 0.9], 6, 1.5, [1, 1]),
        ([3, 3], [0.9, 0.9], 0, 1.0, [0, 0]),
    ],
)
def test_guesses_are_checked_where_that_pays(
    lengths: list[int], rates: list[float], spare: int, ratio: float, expected: list[int]
) -> None:
    assert share_rows([[0] * length for length in lengths], rates, spare, ratio) == expected


def test_it_switches_off_and_on_again() -> None:
    """A text that repeats itself, then does not, then does again, with a check that costs twice a plain call."""
    rng = np.random.default_rng(0)
    passage = rng.integers(100, 1000, 60).tolist()
    noise = [token for number in range(2000, 2300, 2) for token in (1, 2, number, number + 1)]
    follower, checks = Guesser(np.array(passage, np.int32), 2000), []
    for token in [*passage, *noise, *passage]:
        guesses = follower.guess(3)
        checks.append(sum(share_rows([guesses], [follower.rate], 3, 2.0)) > 0)
        follower.accept(token)
    assert np.mean(checks[5:60]) > 0.8
    assert np.mean(checks[60 : 60 + len(noise)]) < 0.05
    assert np.mean(checks[-50:]) > 0.8
