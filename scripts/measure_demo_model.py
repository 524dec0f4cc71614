"""Measures what two-stage attention keeps of the demo model's accuracy, on the artifacts of scripts/demo.sh.

Tasks: LongEval's published cases (give their files), generated records with questions after the record, and records
with questions all along, the hard case for a selection that queries share. Prints a table and, last, a JSON list.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

import iceformer
from iceformer.deploy.session import Session
from iceformer.evaluate.line_retrieval import Record, make_record, pseudo_words, read_longeval
from iceformer.evaluate.retention import Task, answers_right, retention

OUTPUT = Path(__file__).resolve().parent.parent / "demo" / "output"
err = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One task: accuracies as right answers of all, seconds summed over the records."""

    task: str
    tokens: int
    questions: int
    exact: int
    two_stage: int
    retention: float
    exact_s: float
    two_stage_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=Path, default=OUTPUT / "exact", help="artifact with exact attention")
    parser.add_argument(
        "--two-stage", type=Path, default=OUTPUT / "two_stage", help="artifact with two-stage attention"
    )
    parser.add_argument("--longeval", type=Path, nargs="*", default=[], metavar="FILE", help="200_lines.jsonl ...")
    parser.add_argument("--lines", type=int, default=920, help="lines of the records with questions at the end")
    parser.add_argument("--records", type=int, default=4, help="generated records of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the generated records")
    arguments = parser.parse_args()
    sessions = iceformer.load(arguments.exact), iceformer.load(arguments.two_stage)
    tokenizer = Tokenizer.from_file(str(arguments.exact / "tokenizer.json"))

    tasks = {f"LongEval {file.stem}": read_longeval(file) for file in arguments.longeval}
    rng = np.random.default_rng(arguments.seed)
    words = pseudo_words(rng, 4000)
    tasks["questions after the record"] = [
        make_record(rng, arguments.lines, words, closing=20) for _ in range(arguments.records)
    ]
    tasks["questions all along"] = [
        make_record(rng, arguments.lines // 2, words, asked=0.9, closing=1) for _ in range(arguments.records)
    ]
    rows = [measure(name, records, tokenizer, sessions) for name, records in tasks.items()]
    Console().print(table(rows))
    print(json.dumps([asdict(row) for row in rows]))


def measure(name: str, records: list[Record], tokenizer: Tokenizer, sessions: tuple[Session, Session]) -> Row:
    """Asks both sessions every question, one record after the other in turn."""
    right: list[list[bool]] = [[], []]
    seconds = [0.0, 0.0]
    tasks = [Task.of(record, tokenizer) for record in records]
    for task in track(tasks, name, console=err):
        for index, session in enumerate(sessions):
            start = time.perf_counter()
            right[index] += answers_right(session, task).tolist()
            seconds[index] += time.perf_counter() - start
    return Row(
        name,
        max(len(task.ids) for task in tasks),
        len(right[0]),
        sum(right[0]),
        sum(right[1]),
        round(retention(*right), 4),
        round(seconds[0], 2),
        round(seconds[1], 2),
    )


def table(rows: list[Row]) -> Table:
    """The rows for people."""
    result = Table()
    for column in ("task", "tokens", "exact", "two-stage", "retention", "exact s", "two-stage s"):
        result.add_column(column, justify="left" if column == "task" else "right")
    for row in rows:
        result.add_row(
            row.task,
            str(row.tokens),
            f"{row.exact}/{row.questions}",
            f"{row.two_stage}/{row.questions}",
            f"{row.retention:.3f}",
            f"{row.exact_s:.1f}",
            f"{row.two_stage_s:.1f}",
        )
    return result


if __name__ == "__main__":
    main()
