"""What an attention configuration keeps of the demo model's answers: the line that stands beside every measured speed.

Records of line retrieval go through the demo model with exact attention and with the very configuration that is timed.
Questions after the record are asked with the exact last block, where they stand, and without it; questions all along
are the hard case for a selection that queries share.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..attention import Attention, Exact, TwoStage
from ..convert.convert import convert_checkpoint
from ..deploy.compile import compile as compile_checkpoint
from ..deploy.session import Session, load
from .line_retrieval import Record, longest_fit, make_record, pseudo_words
from .processes import Report
from .retention import Task, answers_right

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
AT_THE_END, ALL_ALONG = "questions at the end", "questions all along"
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class Kept:
    """One task with one configuration.

    Attributes:
        task: where the questions stand.
        exact_last_block: whether the last block of a prompt was attended exactly.
        tokens: of the longest record.
        records: how many there are.
        questions: in all of them.
        exact: answers that are right with exact attention.
        two_stage: answers that are right with two-stage attention.
    """

    task: str
    exact_last_block: bool
    tokens: int
    records: int
    questions: int
    exact: int
    two_stage: int

    @property
    def retention(self) -> float:
        """Right answers with two-stage attention over those with exact attention, NaN if the latter has none."""
        return self.two_stage / self.exact if self.exact else float("nan")

    def line(self) -> str:
        """The figures for people."""
        block = "exact last block" if self.exact_last_block else "no exact last block"
        return (
            f"{self.retention:.3f}  {self.task}, {block}: {self.two_stage} answers right, with exact attention "
            f"{self.exact}, of {self.questions} in {self.records} records of up to {self.tokens} tokens"
        )


@dataclass(frozen=True)
class Retention:
    """All tasks with one configuration and dtype, or why there are none.

    Attributes:
        asked: records of each kind and their most tokens.
        kept: one for each task measured so far.
        missing: why nothing was measured, or why not all of it; empty if all was.
    """

    asked: tuple[int, int] = (0, 0)
    kept: tuple[Kept, ...] = ()
    missing: str = "not measured yet"

    def lines(self) -> list[str]:
        """What is to stand beside every speed."""
        lines = [f"retention {kept.line()}" for kept in self.kept]
        return lines + ([f"retention not measured: {self.missing}"] if self.missing else [])

    def brief(self) -> str:
        """The ratios alone, in one line."""
        if not self.kept:
            return f"retention not measured: {self.missing}"
        ratios = [
            f"{kept.retention:.3f} {kept.task}{'' if kept.exact_last_block else ' (no exact last block)'}"
            for kept in self.kept
        ]
        return f"retention {', '.join(ratios)}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the ratio."""
        kept = [{**asdict(kept), "retention": _json_number(kept.retention)} for kept in self.kept]
        return {"asked": list(self.asked), "kept": kept, "missing": self.missing}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Retention":
        """Reads what `to_dict` gave."""
        kept = tuple(Kept(**{k: v for k, v in row.items() if k != "retention"}) for row in content["kept"])
        return cls((content["asked"][0], content["asked"][1]), kept, content["missing"])


def measure_retention(
    work: Path,
    attention: TwoStage,
    dtype: str,
    *,
    records: int,
    tokens: int,
    earlier: Retention,
    report: Report,
    save: Callable[[Retention], None],
    model: Path = DEMO_MODEL,
) -> Retention:
    """Measures what is not there yet; calls `save` after each task, so that an interrupted run goes on from there.

    Args:
        work: folder for artifacts.
        attention: the configuration that is timed.
        dtype: "float32" or "bfloat16".
        records: of each kind.
        tokens: that a record has at most, and nearly.
        earlier: what an earlier run measured; taken up if it asked the same.
        report: called with a line of text at each step.
        save: called with what is known after each task.
        model: Hugging Face folder of the demo model.

    Raises:
        ValueError: fewer records than 1, or tokens too few for a record.
    """
    if records < 1 or tokens < _LEAST_TOKENS:
        raise ValueError(
            f"{records} records of {tokens} tokens, expected at least 1 of at least {_LEAST_TOKENS} tokens"
        )
    if not model.is_dir():
        return Retention(missing="the demo model is only in the repository (demo/model): run from a checkout of it")
    current = earlier if earlier.asked == (records, tokens) else Retention((records, tokens))
    bench = _Bench(work, model, dtype, tokens, report)
    plan = [
        (AT_THE_END, replace(attention, exact_last_block=True)),
        (AT_THE_END, replace(attention, exact_last_block=False)),
        (ALL_ALONG, attention),
    ]
    known = {(kept.task, kept.exact_last_block) for kept in current.kept}
    for index, (task, config) in enumerate(plan):
        if (task, config.exact_last_block) not in known:
            missing = "" if index == len(plan) - 1 else "the other tasks were interrupted"
            current = replace(current, kept=(*current.kept, bench.ask(task, config, records)), missing=missing)
            save(current)
    return current


class _Bench:
    """The demo model's sessions and tasks, each made when it is first needed."""

    def __init__(self, work: Path, model: Path, dtype: str, tokens: int, report: Report) -> None:
        self._work, self._model, self._dtype, self._tokens, self._report = work, model, dtype, tokens, report
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._words = pseudo_words(np.random.default_rng(0), 4000)
        self._exact: dict[str, NDArray[np.bool_]] = {}

    def ask(self, name: str, config: TwoStage, records: int) -> Kept:
        """Asks every question of a task, with exact attention where that has not been done, and with `config`."""
        tasks = [self._task(name, seed) for seed in range(records)]
        if name not in self._exact:
            self._exact[name] = self._answers(name, tasks, "exact", Exact())
        form = "two_stage" if config.exact_last_block else "two_stage-no_exact_last_block"
        selected = self._answers(name, tasks, form, config)
        longest = max(len(task.ids) for task in tasks)
        exact = self._exact[name]
        return Kept(name, config.exact_last_block, longest, records, len(exact), int(exact.sum()), int(selected.sum()))

    def _answers(self, name: str, tasks: list[Task], form: str, config: Attention) -> NDArray[np.bool_]:
        session = self._session(form, config)
        right = []
        for number, task in enumerate(tasks, start=1):
            self._report(f"retention: {name}, record {number} of {len(tasks)}, {form}")
            right.append(answers_right(session, task))
        return np.concatenate(right)

    def _session(self, form: str, config: Attention) -> Session:
        checkpoint, artifact = self._work / "checkpoint", self._work / f"{form}-{self._tokens}"
        if not checkpoint.exists():
            convert_checkpoint(self._model, checkpoint)
        if not artifact.exists():
            self._report(f"retention: compiling the demo model, {form}")
            chunk = min(2048, self._tokens)
            bucket = -(-self._tokens // chunk) * chunk
            compile_checkpoint(
                checkpoint, artifact, buckets=(bucket,), attention=config, dtype=self._dtype, chunk=chunk
            )
        return load(artifact, cache_ram=0)

    def _task(self, name: str, seed: int) -> Task:
        """A record of nearly as many tokens as are wanted, and never more."""

        def make(lines: int) -> Task:
            return Task.of(self._record(name, seed, lines), self._tokenizer)

        return longest_fit(make, lambda task: len(task.ids), self._tokens)[0]

    def _record(self, name: str, seed: int, lines: int) -> Record:
        rng = np.random.default_rng(seed)
        if name == ALL_ALONG:
            return make_record(rng, lines, self._words, asked=0.9, closing=1)
        return make_record(rng, lines, self._words, closing=max(1, min(20, self._tokens // 256)))


def _json_number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
