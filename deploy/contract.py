"""The retention contract: for each bucket the cheapest attention, and for all one format of keys and values, that keep
what was asked of exact attention.

Windows of held-out text, each as long as its bucket, go through the model as prompts do, in one configuration after
another. Speed and retention of a configuration come from the same reading.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Array, Int32
from numpy.typing import ArrayLike

from ..attention import Attention, Exact, Plan, TwoStage, attention_to_dict
from ..attention.two_stage import LEAST_BY_MASS
from ..model.decoder import CausalLM
from ..model.self_attention import LayerConstants
from .calibration import calibrating_tokens, calibration_ids, held_out_ids, read_tokenizer
from .crossover import Choice
from .evidence import Contract, Evidence, described, name_of
from .fidelity import Fidelity, comparison, first_of_last_quarter
from .manifest import CalibrationInfo
from .reader import Reader
from .steps import Steps
from .text_windows import Text, leading_tokens, windows_of

MASSES = (0.95, 0.98, 0.99, 0.995)
"""What is tried by mass, from the cheapest on."""
WINDOWS = 2
"""Windows of the held-out text that a bucket is judged on, at most."""
_LEAST_TOKENS = 64
"""Of a window: its last quarter must say something."""

Ids = Int32[np.ndarray, " tokens"]


@dataclass(frozen=True, eq=False)
class Terms:
    """A contract, what may fulfil it, and what it is judged on.

    Attributes:
        contract: what is asked.
        two_stage: from which the ladder is made.
        kv_dtypes: formats of keys and values to choose from, the cheapest first.
        windows: held-out tokens, by the capacity of each bucket that is judged, which is their length.
        held_out: the record of the text that they come from.
    """

    contract: Contract
    two_stage: TwoStage
    kv_dtypes: tuple[str, ...]
    windows: Mapping[int, list[Ids]]
    held_out: CalibrationInfo

    @property
    def most_readings(self) -> int:
        """How often the windows of a bucket are read, for all buckets together and at most."""
        return sum(1 + len(self.kv_dtypes) + len(ladder(self.two_stage, capacity)) for capacity in self.windows)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is judged.

    Attributes:
        reference: the model with its own weights.
        model: the model with the weights that it is compiled with.
        weights: their format; "same" where both models are one.
        constants: what the attention was calibrated to.
        dtype: of activations, and of keys and values unless they are int8.
        chunk: prompt tokens of a call.
    """

    reference: CausalLM
    model: CausalLM
    weights: str
    constants: LayerConstants | None
    dtype: str
    chunk: int

    def is_rounded(self, kv_dtype: str) -> bool:
        """Whether exact attention over keys and values in a format is something else than the reference."""
        return self.weights != "same" or kv_dtype != self.dtype


def held_out_windows(
    source: str | Path | ArrayLike | None,
    tokenizer_json: Path,
    vocab_size: int,
    max_tokens: int,
    judged: Sequence[int],
    weights: str = "same",
) -> tuple[dict[int, list[Ids]], CalibrationInfo]:
    """Windows of what follows the tokens that calibrate: for each bucket `WINDOWS` of them, or the one that there is.

    Args:
        source: as `compile` takes it for calibration.
        tokenizer_json: the checkpoint's tokenizer.json, which need not exist.
        vocab_size: ids must be below it.
        max_tokens: what the model takes at most.
        judged: capacities of the buckets, rising; with none of them nothing is read.
        weights: their format.

    Raises:
        ValueError: a text without a window of each length, or a bucket that is too short to be judged.
    """
    calibrating = calibrating_tokens(max_tokens, weights)
    ids, info = held_out_ids(source, tokenizer_json, vocab_size, max_tokens, calibrating)
    if not judged:
        return {}, info
    if judged[0] < _LEAST_TOKENS:
        raise ValueError(
            f"bucket {judged[0]} is too short to be judged by a contract, expected at least {_LEAST_TOKENS} tokens"
        )
    tokenizer = read_tokenizer(tokenizer_json, vocab_size) if tokenizer_json.exists() else None
    leading = leading_tokens(tokenizer)
    longest = judged[-1] - leading.size
    if ids.size < longest:
        found = ids.size + calibration_ids(source, tokenizer_json, vocab_size, calibrating, calibrating)[1].tokens
        raise ValueError(
            f"calibration ({info.kind}) has {found} tokens, expected at least {calibrating + longest}: {calibrating} "
            f"that calibrate, and behind them {longest} on which bucket {judged[-1]} is judged: give calibration=FILE"
        )
    text = Text(info.kind, info.sha256, ids)
    counts = {capacity: min(WINDOWS, ids.size // (capacity - leading.size)) for capacity in judged}
    windows = {
        capacity: [window.ids for window in windows_of([text], capacity, count, leading)]
        for capacity, count in counts.items()
    }
    return windows, info


def ladder(two_stage: TwoStage, capacity: int) -> tuple[TwoStage, ...]:
    """What is tried in a bucket instead of exact attention, by rising cost: the fixed budget that was asked for, if it
    is one, then by mass. A least and a most that were asked for bound the masses too; else the most is the bucket."""
    masses = sorted({*MASSES, two_stage.mass or 0.0} - {0.0})
    if two_stage.mass:
        return tuple(replace(two_stage, mass=mass) for mass in masses)
    budget = (min(two_stage.least_keys, LEAST_BY_MASS), max(two_stage.most_keys, capacity))
    return (two_stage, *(replace(two_stage, mass=mass, budget=budget) for mass in masses))


def fulfil(
    terms: Terms, subject: Subject, buckets: Sequence[int], choices: Sequence[Choice], report: Steps
) -> tuple[str, tuple[Choice, ...]]:
    """The format of keys and values, and the choice of each bucket with its evidence.

    In each format, the cheapest first, exact attention is read first. Where it fulfils the contract in every bucket,
    those that may select climb the ladder up to the first configuration that does too, and take that if it was faster.

    Args:
        terms: the contract, with windows of every bucket in which it is a question.
        subject: the model.
        buckets: capacities, rising.
        choices: what is faster in each bucket, whatever it keeps.
        report: called before each reading; those that were not needed are dropped.

    Raises:
        ValueError: nothing fulfils the contract; the message says how near exact attention came in each bucket.
    """
    judge = _Judge(terms, subject, report)
    pairs = list(zip(buckets, choices, strict=True))
    for kv_dtype in terms.kv_dtypes:
        judged = [
            capacity
            for capacity, choice in pairs
            if subject.is_rounded(kv_dtype) or isinstance(choice.plan.prompt, TwoStage)
        ]
        exact = [judge.measure(capacity, Exact(), kv_dtype) for capacity in judged]
        if all(evidence.holds for evidence in exact):
            chosen = tuple(judge.choose(choice, capacity, kv_dtype) for capacity, choice in pairs)
            report.drop(terms.most_readings - judge.readings)
            return kv_dtype, chosen
    raise ValueError(judge.refusal())


class _Judge:
    """Reads the windows of buckets in one configuration after another, and compares each with the reference.

    Attributes:
        readings: how often the windows of a bucket were read.
    """

    def __init__(self, terms: Terms, subject: Subject, report: Callable[[str], None]) -> None:
        self.readings = 0
        self._contract, self._windows, self._subject, self._report = terms.contract, terms.windows, subject, report
        self._compare = comparison(subject.reference, subject.model)
        self._references: dict[int, tuple[list[Array], float]] = {}
        self._measured: dict[int, dict[tuple[Attention, str], Evidence]] = {capacity: {} for capacity in self._windows}

    def measure(self, capacity: int, attention: Attention, kv_dtype: str) -> Evidence:
        """What a configuration keeps, which is measured once."""
        known = self._measured[capacity]
        if (attention, kv_dtype) not in known:
            known[attention, kv_dtype] = self._evidence(capacity, attention, kv_dtype)
        return known[attention, kv_dtype]

    def choose(self, choice: Choice, capacity: int, kv_dtype: str) -> Choice:
        """The choice of a bucket in which exact attention fulfils the contract, with all evidence for it."""
        if not self._measured.get(capacity):  # exact attention in the reference's formats
            return choice
        exact = self.measure(capacity, Exact(), kv_dtype)
        attention, chosen, reason = self._climbed(choice, capacity, kv_dtype, exact)
        evidence = tuple(replace(each, chosen=each is chosen) for each in self._measured[capacity].values())
        return Choice(Plan(attention), reason, evidence)

    def _climbed(
        self, choice: Choice, capacity: int, kv_dtype: str, exact: Evidence
    ) -> tuple[Attention, Evidence, str]:
        kept = self._contract.kept
        if not isinstance(choice.plan.prompt, TwoStage):
            return Exact(), exact, f"{choice.reason}; it {kept(exact.agreement, exact.kl)}"
        for attention in ladder(choice.plan.prompt, capacity):
            found = self.measure(capacity, attention, kv_dtype)
            name, share = name_of(found.attention), found.seconds / exact.seconds
            if found.holds and share < 1:
                what = f"{name} {kept(found.agreement, found.kl)} in {share:.2f} of the time of exact attention"
                return attention, found, f"two-stage from {attention.exact_keys} keys: {what}"
            if found.holds:
                return Exact(), exact, f"exact: {name} holds {self._contract}, but took {share:.2f} of its time"
            if attention.mass and share >= 1:
                break  # more mass takes longer still
        return Exact(), exact, f"exact: nothing faster holds {self._contract}"

    def refusal(self) -> str:
        """Why nothing was chosen: how near exact attention came in each bucket, in the format in which it kept most."""
        found = {
            capacity: max(measured.values(), key=lambda each: (each.agreement, -each.kl))
            for capacity, measured in self._measured.items()
        }
        near = "; ".join(
            f"bucket {capacity}: {best} {self._contract.kept(best.agreement, best.kl)}"
            for capacity, best in found.items()
        )
        return f"no configuration holds {self._contract} ({near}): ask for less, or round weights, keys and values less"

    def _evidence(self, capacity: int, attention: Attention, kv_dtype: str) -> Evidence:
        subject = self._subject
        exact, seconds = self._reference(capacity)
        ends = exact
        if attention != Exact() or subject.is_rounded(kv_dtype):
            ends, seconds = self._read(subject.model, capacity, attention, kv_dtype)
        parts = [
            Fidelity.of(self._compare(before, after, ids[first_of_last_quarter(capacity) :]))
            for before, after, ids in zip(exact, ends, self._windows[capacity], strict=True)
        ]
        kept = Fidelity.merged(parts)
        return Evidence(
            attention=attention_to_dict(attention),
            kv_dtype=kv_dtype,
            weights=subject.weights,
            agreement=kept.agreement,
            kl=kept.kl,
            loss=kept.loss,
            positions=kept.positions,
            seconds=seconds,
            holds=self._contract.holds(kept.agreement, kept.kl),
            chosen=False,
        )

    def _reference(self, capacity: int) -> tuple[list[Array], float]:
        if capacity not in self._references:
            subject = self._subject
            self._references[capacity] = self._read(subject.reference, capacity, Exact(), subject.dtype)
        return self._references[capacity]

    def _read(self, model: CausalLM, capacity: int, attention: Attention, kv_dtype: str) -> tuple[list[Array], float]:
        """Hidden states of the last quarter of each window, and the median seconds of a window."""
        subject = self._subject
        self.readings += 1
        weights = "same" if model is subject.reference else subject.weights
        self._report(f"reading {capacity} tokens by {described(attention_to_dict(attention), weights, kv_dtype)}")
        chunk = min(subject.chunk, capacity)
        reader = Reader(model, attention, subject.constants, capacity=capacity, chunk=chunk, kv_dtype=kv_dtype)
        reader.warm_up()
        readings = [reader.read(ids) for ids in self._windows[capacity]]
        ends = [hidden[first_of_last_quarter(capacity) :] for hidden, _ in readings]
        return ends, statistics.median(seconds for _, seconds in readings)
