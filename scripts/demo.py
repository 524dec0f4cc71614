"""The demo: from a Hugging Face folder to answers about a long record, with exact and with two-stage attention.

Converts demo/model, compiles it twice, opens each artifact in a process of its own (this script again, as
`demo.py --answer`), and compares what they answer. Everything it writes lies in demo/output.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo" / "output"
BUCKETS = (4096, 16384)
LINES = 900
QUESTIONS = 40
console = Console(soft_wrap=True)
err = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="Hugging Face folder")
    parser.add_argument(
        "--budget", type=int, default=1024, help="keys that a query attends to with two-stage attention"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the record and its questions")
    parser.add_argument("--answer", type=Path, metavar="ARTIFACT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        print(json.dumps(answer(arguments.answer, arguments.seed)))
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Converts, compiles, asks, and prints what came of it."""
    import iceformer
    from iceformer.attention.coverage import keys_attended
    from iceformer.evaluate.retention import retention

    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    console.rule("convert")
    checkpoint = iceformer.convert_checkpoint(arguments.model, OUTPUT / "checkpoint", progress=True)
    two_stage = iceformer.TwoStage(budget=arguments.budget)
    answers: dict[str, dict[str, Any]] = {}
    compile_seconds = {}
    for name, attention in (("exact", iceformer.Exact()), ("two_stage", two_stage)):
        console.rule(f"compile with {name.replace('_', '-')} attention")
        start = time.perf_counter()
        iceformer.compile(checkpoint, OUTPUT / name, buckets=BUCKETS, attention=attention, progress=True)
        compile_seconds[name] = time.perf_counter() - start
    console.rule("answer, each artifact in a fresh process")
    for name in compile_seconds:
        answers[name] = ask_process(OUTPUT / name, arguments.seed, name)

    exact, selected = answers["exact"], answers["two_stage"]
    figures = {
        "retention": retention(exact["right"], selected["right"]),
        "keys_attended": keys_attended(two_stage, exact["prompt_tokens"]),
        "exact_s": exact["seconds"],
        "two_stage_s": selected["seconds"],
        "load_s": selected["load_seconds"],
        "compile_s": compile_seconds["two_stage"],
        "exact_accuracy": float(np.mean(exact["right"])),
        "two_stage_accuracy": float(np.mean(selected["right"])),
        "questions": len(exact["right"]),
        "prompt_tokens": exact["prompt_tokens"],
    }
    report(exact, selected, figures)
    # A model that answers nothing right has no retention, and JSON has no NaN.
    print(json.dumps({key: None if math.isnan(value) else round(value, 4) for key, value in figures.items()}))


def ask_process(artifact: Path, seed: int, name: str) -> dict[str, Any]:
    """Runs `demo.py --answer` and gives what it prints; its progress bars go to this terminal."""
    err.print(f"{name.replace('_', '-')} attention: {artifact.relative_to(ROOT)}")
    command = [sys.executable, __file__, "--answer", str(artifact), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the process that answers from {artifact} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def answer(artifact: Path, seed: int) -> dict[str, Any]:
    """Loads an artifact, answers one question by generating and all of them by scoring, and gives times and answers."""
    from tokenizers import Tokenizer

    import iceformer
    from iceformer.evaluate.line_retrieval import QUESTION, make_record, pseudo_words
    from iceformer.evaluate.retention import Task, answers_right

    rng = np.random.default_rng(seed)
    record = make_record(rng, LINES, pseudo_words(rng, 4000), closing=QUESTIONS)
    first = record.questions[0]
    prompt = record.text[: first.start]
    with bar() as progress:
        start = time.perf_counter()
        session = iceformer.load(artifact)
        load_seconds = time.perf_counter() - start
        steps = progress.add_task("reading the record")
        start = time.perf_counter()
        generation = session.generate(prompt, 8, progress=moves(progress, steps))
        seconds = time.perf_counter() - start
        steps = progress.add_task(f"answering {QUESTIONS} questions")
        task = Task.of(record, Tokenizer.from_file(str(artifact / "tokenizer.json")))
        right = answers_right(session, task, moves(progress, steps))
    return {
        "question": QUESTION.format(key=first.key).strip(),
        "expected": str(first.value),
        "answer": (generation.text or "").split(">")[0].strip(),
        "prompt_tokens": generation.prompt_tokens,
        "seconds": seconds,
        "load_seconds": load_seconds,
        "right": right.tolist(),
    }


def report(exact: dict[str, Any], selected: dict[str, Any], figures: dict[str, float]) -> None:
    """The figures for people."""
    console.rule("result")
    lines = [
        f"record             {LINES} lines, {figures['prompt_tokens']} tokens",
        f"question           {exact['question']}",
        f"right answer       {exact['expected']}",
        f"exact answer       {exact['answer']}   in {figures['exact_s']:.2f} s",
        f"two-stage answer   {selected['answer']}   in {figures['two_stage_s']:.2f} s",
        f"accuracy           exact {sum(exact['right'])}/{figures['questions']}, "
        f"two-stage {sum(selected['right'])}/{figures['questions']} questions after the record",
        f"retention          {figures['retention']:.3f}",
        f"keys attended      {figures['keys_attended']:.1%} of those that exact attention reads",
        f"compile, load      {figures['compile_s']:.1f} s once, then {figures['load_s']:.2f} s",
        f"artifact           {(OUTPUT / 'two_stage').relative_to(ROOT)}",
    ]
    for line in lines:
        console.print(line, highlight=False)


def moves(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    """A callback that moves a bar to `done` of `total` tokens."""
    return lambda done, total: progress.update(task, completed=done, total=total)


def bar() -> Progress:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err)


if __name__ == "__main__":
    main()
