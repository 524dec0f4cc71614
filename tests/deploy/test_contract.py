"""The retention contract: what is chosen of made-up figures, what is refused, and one artifact from end to end."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import iceformer
from iceformer.attention import LowRank, Plan
from iceformer.cli import app
from iceformer.deploy import calibration, crossover
from iceformer.deploy import contract as module
from iceformer.deploy.agreement import check_agreement
from iceformer.deploy.contract import MASSES, Subject, Terms, fulfil, ladder
from iceformer.deploy.crossover import Choice, CrossoverTable
from iceformer.deploy.evidence import Contract, Evidence
from iceformer.deploy.examples import read_examples
from iceformer.deploy.held_out import Prompt, held_out_prompts
from iceformer.deploy.manifest import ArtifactError, CalibrationInfo, CrossoverRow, Manifest, parse_manifest
from iceformer.deploy.reader import Reader
from iceformer.deploy.session import Session
from iceformer.deploy.steps import Steps
from iceformer.deploy.tables import evidence_rows
from iceformer.model.decoder import CausalLM

from ..test_cli import run
from .conftest import CHUNK, VOCABULARY

TWO_STAGE = iceformer.TwoStage(method=LowRank(rank=4), budget=32, query_block=8, key_block=2, sink=4, local=4)
CALIBRATING = 512
"""Tokens that calibrate, of a model of 512 positions."""


class TestContract:
    @pytest.mark.parametrize("retain", [0.0, -0.5, 1.01, float("nan")])
    def test_retain_is_a_share(self, retain: float) -> None:
        with pytest.raises(ValueError, match="expected a share of the positions above 0 and up to 1"):
            Contract(retain=retain)

    @pytest.mark.parametrize("kl", [0.0, -0.1, float("inf"), float("nan")])
    def test_kl_is_a_number_of_nats(self, kl: float) -> None:
        with pytest.raises(ValueError, match="expected a number of nats above 0"):
            Contract(kl=kl)

    def test_is_one_bound(self) -> None:
        for both in (Contract, lambda: Contract(0.99, 0.01)):
            with pytest.raises(ValueError, match=r"expected one of them"):
                both()

    def test_bounds_are_part_of_it(self) -> None:
        assert Contract(retain=0.9).holds(0.9, 5.0)
        assert not Contract(retain=0.9).holds(0.899, 0.0)
        assert Contract(kl=0.1).holds(0.0, 0.1)
        assert not Contract(kl=0.1).holds(1.0, 0.11)
        assert (str(Contract(retain=0.985)), str(Contract(kl=0.01))) == ("retain 0.985", "kl 0.01")


class TestLadder:
    def test_a_fixed_budget_comes_before_the_masses(self) -> None:
        first, *others = ladder(iceformer.TwoStage(budget=1024, crossover=2048), 8192)
        assert first == iceformer.TwoStage(budget=1024, crossover=2048)
        assert [(each.mass, each.budget, each.crossover) for each in others] == [
            (mass, (512, 8192), 2048) for mass in MASSES
        ]

    def test_a_mass_is_one_among_others_with_its_own_bounds(self) -> None:
        found = ladder(iceformer.TwoStage(mass=0.97, budget=(256, 4096)), 8192)
        assert [each.mass for each in found] == sorted([*MASSES, 0.97])
        assert {each.budget for each in found} == {(256, 4096)}
        assert [each.mass for each in ladder(iceformer.TwoStage(mass=0.98), 8192)] == list(MASSES)

    def test_all_share_one_calibration(self) -> None:
        assert len({each.rule for each in ladder(TWO_STAGE, 256)}) == 1


FLOATS, ROUNDED = object.__new__(CausalLM), object.__new__(CausalLM)
"""Stand for models."""
SMALL, LARGE = 128, 256
Figures = dict[tuple[int, str], tuple[float, float, float]]
"""Seconds, agreement and divergence, by capacity and configuration; `exact` and `exact int8`, `budget 32`, ..."""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Figures], list[tuple[int, str]]]:
    """Puts figures in place of a model; what was read is in the list that comes back."""

    def use(figures: Figures) -> list[tuple[int, str]]:
        read: list[tuple[int, str]] = []

        class FakeReader:
            def __init__(self, model: Any, attention: Any, constants: Any, *, capacity: int, kv_dtype: str, **_: Any):
                name = "exact" if attention == iceformer.Exact() else f"budget {attention.budget}"
                name = f"mass {attention.mass}" if getattr(attention, "mass", 0) else name
                rounded = [*(["int8"] if model is ROUNDED else []), *(["kv"] if kv_dtype == "int8" else [])]
                self.key = capacity, " ".join([name, *rounded])

            def warm_up(self) -> None:
                pass

            def read(self, ids: Any) -> Any:
                read.append(self.key)
                return jnp.full((ids.size, 1), len(read) - 1), figures[self.key][0]

        def compare(before: Any, after: Any, ids: Any) -> dict[str, np.ndarray]:
            assert before.shape == after.shape == (ids.size, 1)
            (capacity, exact), key = read[int(before[0, 0])], read[int(after[0, 0])]
            assert exact == "exact"
            assert ids.size == capacity // 4
            _, agreement, kl = (0.0, 1.0, 0.0) if key == (capacity, exact) else figures[key]
            values = {"agreement": agreement, "kl": kl, "exact_logprob": -1.0, "logprob": -1.5}
            return {name: np.full(ids.size - 1, value) for name, value in values.items()}

        monkeypatch.setattr(module, "Reader", FakeReader)
        monkeypatch.setattr(module, "comparison", lambda *_: compare)
        return read

    return use


SELECTS = Choice(Plan(dataclasses.replace(TWO_STAGE, crossover=64)), "two-stage from 64 keys: faster")
ATTENDS = Choice(Plan(), "exact: faster")


def chosen(
    contract: Contract,
    *choices: Choice,
    kv_dtypes: tuple[str, ...] = ("float32",),
    weights: str = "same",
    steps: Steps | None = None,
) -> tuple[str, tuple[Choice, ...]]:
    """What is chosen for a bucket of 128 tokens, or this and one of 256; a window each."""
    buckets = (SMALL, LARGE)[: len(choices)]
    prompts = {capacity: [Prompt(np.arange(capacity, dtype=np.int32), capacity * 3 // 4)] for capacity in buckets}
    terms = Terms(contract, TWO_STAGE, kv_dtypes, prompts, CalibrationInfo("ids", 1000, "0" * 64))
    subject = Subject(FLOATS, FLOATS if weights == "same" else ROUNDED, weights, None, "float32", 64)
    return fulfil(terms, subject, buckets, choices, steps or Steps(100, lambda **_: None))


def rows(choice: Choice) -> list[tuple[str, str, bool, bool]]:
    return [(str(each), each.kv_dtype, each.holds, each.chosen) for each in choice.evidence]


EXACT = (10.0, 1.0, 0.0)


class TestChoice:
    def test_the_first_that_holds(self, made_up: Callable[[Figures], list[tuple[int, str]]]) -> None:
        read = made_up(
            {
                (SMALL, "exact"): EXACT,
                (SMALL, "budget 32"): (5.0, 0.8, 0.5),
                (SMALL, "mass 0.95"): (6.0, 0.9, 0.05),
                (SMALL, "mass 0.98"): (7.0, 0.97, 0.01),
            }
        )
        steps = Steps(100, lambda **_: None)
        kv_dtype, (choice,) = chosen(Contract(retain=0.95), SELECTS, steps=steps)
        assert kv_dtype == "float32"
        assert [name for _, name in read] == ["exact", "budget 32", "mass 0.95", "mass 0.98"]
        assert choice.plan == Plan(dataclasses.replace(TWO_STAGE, crossover=64, mass=0.98, budget=(32, 128)))
        assert choice.reason == (
            "two-stage from 64 keys: mass 0.98 keeps 0.97 of the most likely tokens in 0.70 of the time of exact "
            "attention"
        )
        assert rows(choice) == [
            ("exact attention", "float32", True, False),
            ("budget 32", "float32", False, False),
            ("mass 0.95", "float32", False, False),
            ("mass 0.98", "float32", True, True),
        ]
        evidence = choice.evidence[2]
        assert (evidence.seconds, evidence.agreement, evidence.kl) == pytest.approx((6.0, 0.9, 0.05))
        assert (evidence.loss, evidence.positions) == (pytest.approx(0.5), SMALL // 4 - 1)
        # Of the readings that there may be, all five rungs and exact attention twice, four were needed.
        assert (steps.total, steps.begun) == (100 - 7 + 4, 4)

    def test_by_divergence(self, made_up: Callable[[Figures], list[tuple[int, str]]]) -> None:
        made_up(
            {
                (SMALL, "exact"): EXACT,
                (SMALL, "budget 32"): (5.0, 0.99, 0.02),
                (SMALL, "mass 0.95"): (6.0, 0.9, 0.01),
            }
        )
        _, (choice,) = chosen(Contract(kl=0.011), SELECTS)
        assert choice.reason.startswith("two-stage from 64 keys: mass 0.95 has a divergence of 0.01 nats in 0.60")

    @pytest.mark.parametrize("seconds", [10.0, 12.0])
    def test_exact_attention_where_it_is_not_slower(
        self, made_up: Callable[[Figures], list[tuple[int, str]]], seconds: float
    ) -> None:
        made_up({(SMALL, "exact"): EXACT, (SMALL, "budget 32"): (seconds, 0.99, 0.0)})
        _, (choice,) = chosen(Contract(retain=0.95), SELECTS)
        assert choice.plan == Plan()
        assert choice.reason == f"exact: budget 32 holds retain 0.95, but took {seconds / 10:.2f} of its time"
        assert rows(choice) == [
            ("exact attention", "float32", True, True),
            ("budget 32", "float32", True, False),
        ]

    def test_what_takes_longer_than_exact_attention_ends_the_search(
        self, made_up: Callable[[Figures], list[tuple[int, str]]]
    ) -> None:
        read = made_up(
            {
                (SMALL, "exact"): EXACT,
                (SMALL, "budget 32"): (11.0, 0.7, 0.1),
                (SMALL, "mass 0.95"): (9.0, 0.8, 0.1),
                (SMALL, "mass 0.98"): (10.5, 0.9, 0.1),
            }
        )
        _, (choice,) = chosen(Contract(retain=0.95), SELECTS)
        assert [name for _, name in read] == ["exact", "budget 32", "mass 0.95", "mass 0.98"]
        assert (choice.plan, choice.reason) == (Plan(), "exact: nothing faster holds retain 0.95")

    def test_nothing_is_read_where_exact_attention_is_the_reference(
        self, made_up: Callable[[Figures], list[tuple[int, str]]]
    ) -> None:
        read = made_up({(LARGE, "exact"): EXACT, (LARGE, "budget 32"): (5.0, 1.0, 0.0)})
        _, (small, large) = chosen(Contract(retain=1.0), ATTENDS, SELECTS)
        assert small == ATTENDS
        assert isinstance(large.plan.prompt, iceformer.TwoStage)
        assert {capacity for capacity, _ in read} == {LARGE}

    def test_int8_keys_and_values_where_every_bucket_holds_with_them(
        self, made_up: Callable[[Figures], list[tuple[int, str]]]
    ) -> None:
        figures = {
            (SMALL, "exact"): EXACT,
            (SMALL, "exact kv"): (9.0, 0.99, 0.01),
            (LARGE, "exact"): (20.0, 1.0, 0.0),
            (LARGE, "exact kv"): (18.0, 0.97, 0.01),
            (LARGE, "budget 32 kv"): (8.0, 0.96, 0.02),
        }
        made_up(figures)
        kv_dtype, (small, large) = chosen(Contract(retain=0.95), ATTENDS, SELECTS, kv_dtypes=("int8", "float32"))
        assert kv_dtype == "int8"
        assert (small.plan, small.reason) == (Plan(), "exact: faster; it keeps 0.99 of the most likely tokens")
        assert rows(small) == [("exact attention with int8 keys and values", "int8", True, True)]
        assert rows(large)[-1] == ("budget 32 with int8 keys and values", "int8", True, True)
        assert "0.44 of the time" in large.reason

    def test_floats_where_one_bucket_does_not_hold_with_int8(
        self, made_up: Callable[[Figures], list[tuple[int, str]]]
    ) -> None:
        read = made_up(
            {
                (SMALL, "exact"): EXACT,
                (SMALL, "exact kv"): (9.0, 0.99, 0.01),
                (LARGE, "exact"): (20.0, 1.0, 0.0),
                (LARGE, "exact kv"): (18.0, 0.94, 0.01),
                (LARGE, "budget 32"): (8.0, 0.96, 0.02),
            }
        )
        kv_dtype, (small, large) = chosen(Contract(retain=0.95), ATTENDS, SELECTS, kv_dtypes=("int8", "float32"))
        assert kv_dtype == "float32"
        assert rows(small) == [
            ("exact attention with int8 keys and values", "int8", True, False),
            ("exact attention", "float32", True, True),
        ]
        assert rows(large) == [
            ("exact attention with int8 keys and values", "int8", False, False),
            ("exact attention", "float32", True, False),
            ("budget 32", "float32", True, True),
        ]
        assert len(read) == len(set(read)), "nothing is read twice"

    def test_refuses_what_weights_alone_cost(self, made_up: Callable[[Figures], list[tuple[int, str]]]) -> None:
        made_up(
            {
                (SMALL, "exact"): EXACT,
                (SMALL, "exact int8"): (9.0, 0.99, 0.01),
                (SMALL, "exact int8 kv"): (9.0, 0.98, 0.02),
                (LARGE, "exact"): (20.0, 1.0, 0.0),
                (LARGE, "exact int8"): (18.0, 0.951, 0.03),
                (LARGE, "exact int8 kv"): (18.0, 0.94, 0.04),
            }
        )
        with pytest.raises(ValueError, match=r"no configuration holds retain 0\.99") as refusal:
            chosen(Contract(retain=0.99), ATTENDS, SELECTS, kv_dtypes=("int8", "float32"), weights="int8")
        assert (
            "(bucket 128: exact attention with int8 weights keeps 0.99 of the most likely tokens; "
            "bucket 256: exact attention with int8 weights keeps 0.951 of the most likely tokens): "
            "ask for less, or round weights, keys and values less"
        ) in str(refusal.value)


class TestHeldOutText:
    def test_windows_follow_what_calibrates(self, checkpoint: Path) -> None:
        ids = np.random.default_rng(0).integers(4, VOCABULARY, CALIBRATING + 300)
        prompts, info = held_out_prompts(ids, checkpoint / "tokenizer.json", VOCABULARY, CALIBRATING, (128, 256))
        assert (info.kind, info.tokens) == ("ids", 300)
        assert {capacity: len(each) for capacity, each in prompts.items()} == {128: 2, 256: 1}
        for capacity, each in prompts.items():
            for prompt in each:
                assert prompt.ids[0] == 1, "the token that begins a text"
                assert (prompt.ids.size, prompt.first) == (capacity, capacity * 3 // 4)
        # Of 300 tokens, the middles of both halves, and of the whole.
        np.testing.assert_array_equal(prompts[128][0].ids[1:], ids[CALIBRATING:][11:138])
        np.testing.assert_array_equal(prompts[128][1].ids[1:], ids[CALIBRATING:][161:288])
        np.testing.assert_array_equal(prompts[256][0].ids[1:], ids[CALIBRATING:][22:277])

    def test_refuses_short_buckets(self, checkpoint: Path) -> None:
        ids = np.full(2000, 5)
        with pytest.raises(ValueError, match="bucket 32 is too short to be judged by a contract, expected at least 64"):
            held_out_prompts(ids, checkpoint / "tokenizer.json", VOCABULARY, CALIBRATING, (32, 128))


class TestTask:
    """The file of examples has a first context that calibrates, one of three questions, and a long one."""

    @pytest.fixture
    def task(self, tmp_path: Path) -> Path:
        words = ["the", "line", "of", "this", "record", "is", "a", "number", "and", "then", "another", "one"]
        rng = np.random.default_rng(0)

        def example(context: str, number: int, **more: object) -> dict[str, object]:
            return {"context": context, "question": "Which?", "answer_prefix": "It is", "answer": f"{number}", **more}

        first, short, long = (" ".join(rng.choice(words, count)) for count in (40, 20, 55))
        examples = [example(first, 1), *(example(short, 10 + index) for index in range(3))]
        examples += [example(first, 2), example(long, 77, answer=["77", "78"], max_new_tokens=5, task="other")]
        file = tmp_path / "task.jsonl"
        file.write_text("\n\n".join(json.dumps(each) for each in examples) + "\n")
        return file

    def test_answers_to_questions_over_other_contexts_count(self, checkpoint: Path, task: Path) -> None:
        tokenizer = calibration.read_tokenizer(checkpoint / "tokenizer.json", VOCABULARY)
        sizes = [tokenizer.encode(each.context).ids.size for each in read_examples(task)]
        buckets = (sizes[1] + 40, sizes[-1] + 60)
        assert buckets[0] < sizes[-1]
        prompts, info = held_out_prompts(task, checkpoint / "tokenizer.json", VOCABULARY, 512, buckets)
        assert [len(prompts[capacity]) for capacity in buckets] == [3, 1]
        assert (info.kind, info.tokens) == ("task", sum(prompt.ids.size for x in prompts.values() for prompt in x))
        answers = [tokenizer.decode(prompt.ids[prompt.first + 1 :].tolist()) for x in prompts.values() for prompt in x]
        assert [answer.strip() for answer in answers] == ["10", "11", "12", "77, 78"]
        for prompt in prompts[buckets[0]]:
            assert tokenizer.decode(prompt.ids[: prompt.first + 1].tolist()).strip().endswith("It is")
        context = calibration.calibration_ids(task, checkpoint / "tokenizer.json", VOCABULARY, 512)
        assert context[1].kind == "task"
        np.testing.assert_array_equal(context[0], tokenizer.encode(read_examples(task)[0].context).ids)

    def test_a_bucket_without_an_example_is_refused(self, checkpoint: Path, task: Path) -> None:
        message = r"calibration \(task.jsonl\) has no example of 501 to 512 tokens for bucket 512 among the 4 behind"
        with pytest.raises(ValueError, match=message):
            held_out_prompts(task, checkpoint / "tokenizer.json", VOCABULARY, 512, (500, 512))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1 is not JSON"),
            ("[]", "line 1 is not an object, expected one with context, question, answer_prefix, answer"),
            ('{"context": "a", "question": "b"}', "line 1 has no text for answer"),
            ('{"context": "a", "question": "", "answer": "c"}', "line 1 has no text for question"),
            ('{"context": "a", "question": "b", "answer": 3}', "line 1 has no text for answer"),
            ('{"context": "a", "question": "b", "answer": "c", "max_new_tokens": 0}', "max_new_tokens is 0"),
            ("", "has no lines"),
        ],
    )
    def test_refuses_other_lines(self, tmp_path: Path, line: str, message: str) -> None:
        file = tmp_path / "task.jsonl"
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_examples(file)

    def test_blanks_are_where_a_model_writes_them(self, tmp_path: Path) -> None:
        file = tmp_path / "task.jsonl"
        lines = [("It is", "5"), ("Answer:", "5"), ("value <", "5>"), ("", "5"), ("It is ", "5")]
        made = [{"context": "a", "question": "b", "answer_prefix": x, "answer": y} for x, y in lines]
        file.write_text("\n".join(map(json.dumps, made)))
        assert [each.answer for each in read_examples(file)] == [" 5", " 5", "5>", "5", "5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain": 0.9, "kl": 0.1}, "retain is 0.9 and kl is 0.1, expected one of them: leave the other out"),
        ({"retain": 1.5}, "retain is 1.5, expected a share"),
        ({"kl": 0.0}, "kl is 0.0, expected a number of nats"),
        ({"retain": 0.9, "attention": TWO_STAGE}, "which leaves retain 0.9 no choice: leave it out, or give Auto"),
        ({"retain": 0.9, "attention": Plan(TWO_STAGE)}, "which leaves retain 0.9 no choice"),
        (
            {"retain": 0.9, "attention": iceformer.Auto(TWO_STAGE, iceformer.DecodeSelection(LowRank(rank=4)))},
            "retain 0.9 is judged on prompts, not on new tokens: leave decode out",
        ),
        ({"kv_dtype": "auto"}, "kv_dtype is 'auto', which a contract chooses: give retain or kl"),
        (
            {"retain": 0.9, "calibration": np.full(CALIBRATING + 100, 5)},
            r"calibration \(ids\) has 612 tokens, expected at least 767: 512 that calibrate, and behind them 255 on "
            "which bucket 256 is judged: give calibration=FILE",
        ),
        ({"retain": 0.9, "calibration": np.full(100, 5)}, r"calibration \(ids\) has 100 tokens, expected at least 767"),
    ],
)
def test_refuses(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"buckets": (256,), "chunk": 64, "attention": iceformer.Auto(TWO_STAGE), **options}
    with pytest.raises(ValueError, match=message):
        iceformer.compile(checkpoint, tmp_path / "artifact", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "kind"), [(True, "text"), (False, "default text")])
def test_refuses_texts_that_are_too_short(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool, kind: str
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time")
    monkeypatch.setattr(calibration, "DEFAULT_TEXT", text)
    message = rf"calibration \({kind}\) has \d\d? tokens, expected at least 767: 512 .* give calibration=FILE"
    with pytest.raises(ValueError, match=message):
        iceformer.compile(
            *(checkpoint, tmp_path / "artifact"),
            buckets=(256,),
            attention=iceformer.Auto(TWO_STAGE),
            calibration=text if given else None,
            retain=0.9,
        )
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--retain 0.9 --kl 0.1", "retain is 0.9 and kl is 0.1, expected one of them"),
        ("--kl 0", "kl is 0.0, expected a number of nats above 0"),
        ("--kv-dtype auto", "kv_dtype is 'auto', which a contract chooses"),
        ("--retain 0.9 --attention exact", "which leaves retain 0.9 no choice"),
        # Of keys and values that may be rounded every bucket is judged, one without a choice too.
        ("--retain 0.9 --kv-dtype auto", "behind them 127 on which bucket 128 is judged: give calibration=FILE"),
    ],
)
def test_the_command_has_the_options(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time")
    arguments = ("--buckets", "128", "--calibration", text, *options.split())
    code, _, err = run(capsys, "compile", checkpoint, tmp_path / "artifact", *arguments)
    assert code == 1
    assert message in " ".join(err.split())


def test_refuses_encoders(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    (checkpoint / "iceformer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"retain 0\.9 is about predictions .* an encoder makes none: leave it out"):
        iceformer.compile(checkpoint, tmp_path / "artifact", retain=0.9)


def text_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCABULARY, tokens)


IDS = text_of(CALIBRATING + 700)
CAPACITY = 256


@pytest.fixture(scope="module")
def faster() -> Iterator[pytest.MonkeyPatch]:
    """Two-stage attention is said to be faster from 64 keys on, and faster the less it keeps; all else is as it is."""
    with pytest.MonkeyPatch.context() as patch:
        measured = (CrossoverRow(100, 2e-3, 1e-3),)
        patch.setattr(crossover, "measure", lambda *_: CrossoverTable(measured, 64))

        class Clock(Reader):
            def __init__(self, model: Any, attention: Any, *more: Any, **options: Any) -> None:
                super().__init__(model, attention, *more, **options)
                self._share = 1.0 if attention == iceformer.Exact() else 0.5 + (attention.mass or 0) / 4

            def read(self, ids: Any) -> Any:
                hidden, seconds = super().read(ids)
                assert seconds > 0
                return hidden, self._share

        patch.setattr(module, "Reader", Clock)
        yield patch


RETAIN = 0.7
OPTIONS: dict[str, Any] = {"buckets": (CAPACITY,), "chunk": CHUNK, "calibration": IDS}


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, faster: pytest.MonkeyPatch) -> Path:
    """An artifact with a contract, of rounded weights, keys and values."""
    return iceformer.compile(
        checkpoint,
        tmp_path_factory.mktemp("contract") / "artifact",
        attention=iceformer.Auto(TWO_STAGE),
        weights="int8",
        kv_dtype="auto",
        retain=RETAIN,
        **OPTIONS,
    )


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return iceformer.load(artifact)


@pytest.fixture(scope="module")
def exact(exact_256_artifact: Path) -> Session:
    return iceformer.load(exact_256_artifact)


def windows() -> list[np.ndarray]:
    """The middles of the halves of what follows the tokens that calibrate, behind the token that begins a text."""
    text = IDS[CALIBRATING:]
    return [np.concatenate([[1], text[start : start + 255]]) for start in ((350 - 255) // 2, 350 + (350 - 255) // 2)]


def test_the_first_that_holds_is_compiled(session: Session) -> None:
    info = session.info
    evidence = info.buckets[0].evidence
    tried = [str(each) for each in evidence]
    assert tried[0] == "exact attention with int8 weights and int8 keys and values"
    assert tried[1] == "budget 32 with int8 weights and int8 keys and values"
    assert [each.holds for each in evidence] == [each.agreement >= RETAIN for each in evidence]
    assert [each.chosen for each in evidence] == [False] * (len(evidence) - 1) + [True]
    assert [each.holds for each in evidence[1:]] == [False] * (len(evidence) - 2) + [True]
    assert len(evidence) > 2, "the figures say nothing if the first that is tried holds"
    assert info.kv_dtype == "int8"
    assert info.buckets[0].plan["prompt"] == evidence[-1].attention
    assert info.buckets[0].plan["prompt"]["crossover"] == 64
    assert info.contract is not None
    assert info.contract.asked == Contract(retain=RETAIN)
    assert (info.contract.held_out.kind, info.contract.held_out.tokens) == ("ids", 700)


def test_evidence_is_what_sessions_give(session: Session, exact: Session) -> None:
    """The compiled entries, over the same windows: another way through other code."""
    (found,) = (each for each in session.info.buckets[0].evidence if each.chosen)
    expected, given = ([each.score(window) for window in windows()] for each in (exact, session))
    end = slice(192, 255)
    same = [before.argmax[end] == after.argmax[end] for before, after in zip(expected, given, strict=True)]
    loss = [before.logprobs[end] - after.logprobs[end] for before, after in zip(expected, given, strict=True)]
    assert found.positions == 2 * 63
    assert found.agreement == pytest.approx(np.mean(same))
    assert found.loss == pytest.approx(np.mean(loss), abs=1e-4)
    assert 0 < found.kl < 1


def test_manifest_is_read_back_strictly(artifact: Path, session: Session) -> None:
    text = (artifact / "manifest.json").read_text()
    assert parse_manifest(text) == session.info
    assert parse_manifest(session.info.to_json()) == session.info
    value = json.loads(text)
    value["contract"]["asked"]["retain"] = None
    with pytest.raises(ArtifactError, match="expected one of them"):
        parse_manifest(json.dumps(value))
    value = json.loads(text)
    del value["buckets"][0]["evidence"][0]["holds"]
    with pytest.raises(ArtifactError, match=r"lacks field buckets\[0\]\.evidence\[0\]\.holds"):
        parse_manifest(json.dumps(value))


def with_evidence(manifest: Manifest, *evidence: Evidence) -> Manifest:
    return dataclasses.replace(manifest, buckets=(dataclasses.replace(manifest.buckets[0], evidence=evidence),))


def test_evidence_that_does_not_fit_is_refused(session: Session) -> None:
    info = session.info
    check_agreement(info)
    *others, last = info.buckets[0].evidence
    for damaged, message in (
        (with_evidence(info, *others), "has 0 configurations that were chosen"),
        (with_evidence(info, last, last), "has 2 configurations that were chosen"),
        (with_evidence(info, dataclasses.replace(last, holds=False)), "does not hold the contract"),
        (with_evidence(info, dataclasses.replace(last, kv_dtype="float32")), "another configuration than the one"),
        (with_evidence(info, dataclasses.replace(last, attention={"kind": 3})), "no attention"),
        (dataclasses.replace(info, contract=None), "has evidence but no contract"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_agreement(damaged)


def test_card_and_inspect_show_the_evidence(artifact: Path, session: Session) -> None:
    card = (artifact / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(artifact)], env={"COLUMNS": "250"}).output
    assert "## Retention contract" in card
    assert "at 0.7 of the positions or more" in card
    assert "contract: retain 0.7" in shown
    assert "retain 0.7, judged on ids, 700 held-out tokens" in shown
    found = evidence_rows(session.info)
    assert [row[:4] for row in found[:2]] == [
        ("256", "exact attention", "int8", "int8"),
        ("256", "budget 32", "int8", "int8"),
    ]
    assert [row[-1] for row in found] == ["holds", *["does not hold"] * (len(found) - 2), "holds, chosen"]
    for row in found:
        assert f"| {' | '.join(row)} |" in card
        assert row[5] in shown


def test_an_artifact_without_a_contract_has_none(exact: Session) -> None:
    assert exact.info.contract is None
    assert exact.info.buckets[0].evidence == ()


def test_a_contract_that_nothing_holds_leaves_nothing(
    checkpoint: Path, tmp_path: Path, faster: pytest.MonkeyPatch
) -> None:
    message = (
        r"no configuration holds kl 1e-09 \(bucket 256: exact attention with int8 weights has a divergence of "
        r"[\d.e-]+ nats\): ask for less"
    )
    with pytest.raises(ValueError, match=message):
        iceformer.compile(
            checkpoint, tmp_path / "a", attention=iceformer.Auto(TWO_STAGE), weights="int8", kl=1e-9, **OPTIONS
        )
    assert list(tmp_path.iterdir()) == []


def test_exact_attention_in_floats_needs_no_text(checkpoint: Path, tmp_path: Path) -> None:
    """The budget covers the bucket: there is no question, and nothing to measure."""
    path = iceformer.compile(checkpoint, tmp_path / "a", buckets=(32,), chunk=32, retain=1.0)
    info = iceformer.load(path).info
    assert info.contract is not None
    assert info.buckets[0].evidence == ()
    assert "Every bucket has the reference itself." in (path / "README.md").read_text()
    assert info.provenance.calibration is None


def test_an_exact_bucket_keeps_no_constants(
    checkpoint: Path, tmp_path: Path, faster: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What selects was calibrated to be judged, and left no trace once exact attention was chosen."""
    monkeypatch.setattr(module, "MASSES", ())
    attention = iceformer.Auto(dataclasses.replace(TWO_STAGE, budget=32))
    path = iceformer.compile(checkpoint, tmp_path / "a", attention=attention, retain=1.0, **OPTIONS)
    info = iceformer.load(path).info
    assert info.buckets[0].plan_reason == "exact: nothing faster holds retain 1"
    first = info.buckets[0].evidence[0]
    assert (str(first), first.agreement, first.kl) == ("exact attention", 1, 0)
    assert info.provenance.calibration is None
    assert not any(name.startswith("attention.") for name in info.weights.tensors)
