"""How much of a checkpoint's accuracy an attention configuration keeps, and how fast it is: `iceformer evaluate`.

Everything is measured beside exact attention, on the same tokens, in one process. What is measured stands in
OUTPUT/evaluation.json at once, so that an interrupted run goes on from there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from numpy.typing import ArrayLike

from ..attention import Attention
from ..deploy.weights import cpu_device
from ..host.files import check_parent
from .attention_level import measure_layers
from .bench import Bench, Options
from .configuration import Configuration, with_reference
from .evaluation_result import RESULT, Evaluation, load_evaluation
from .machine import machine_info
from .model_level import measure_windows
from .processes import Report
from .task_level import ask_questions


def evaluate_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    texts: Sequence[str | Path],
    configurations: Mapping[str, Configuration | Attention] | None = None,
    *,
    options: Options | None = None,
    calibration: str | Path | ArrayLike | None = None,
    report: Report = lambda line: None,
) -> Evaluation:
    """Measures what attention configurations keep of a decoder's predictions, beside their speed.

    Args:
        checkpoint: a folder written by `iceformer.convert_checkpoint`, of a decoder.
        output: folder for the results. An evaluation of the same checkpoint, texts and options goes on where it was
            interrupted.
        texts: UTF-8 files, or .npy and .json files of token ids.
        configurations: by name, what is compared with exact attention; None for two-stage attention with its defaults.
        options: lengths, numbers and tasks.
        calibration: as for `iceformer.compile`.
        report: called with a line of text at each step.

    Raises:
        FileNotFoundError: a text or the checkpoint does not exist.
        ValueError: no decoder, a text that is too short, or a folder that holds another evaluation.
    """
    asked = {"two_stage": Configuration()} if configurations is None else configurations
    wrapped = {name: Configuration(x) if isinstance(x, Attention) else x for name, x in asked.items()}
    work = Path(output)
    check_parent(work / RESULT)
    report("loading the checkpoint")
    with jax.default_device(cpu_device()):
        bench = Bench(Path(checkpoint), with_reference(wrapped), options or Options(), calibration)
        report("reading the texts")
        windows = bench.windows([Path(text) for text in texts])
        work.mkdir(parents=True, exist_ok=True)
        result = start_or_resume(work, bench.settings)
        result = measure_windows(work, result, bench, windows, report)
        result = measure_layers(work, result, bench, windows, report)
        result = ask_questions(work, result, bench, report)
        result.save(work)
        return result


def start_or_resume(work: Path, settings: dict[str, Any]) -> Evaluation:
    """What the folder holds of an evaluation with these settings, or a new one.

    Raises:
        ValueError: the folder holds another evaluation, or one from another machine.
    """
    machine = machine_info()
    if not (work / RESULT).exists():
        return Evaluation(settings, machine)
    found = load_evaluation(work, settings)
    if found.machine["cpu"] != machine["cpu"]:
        raise ValueError(
            f"{work / RESULT} was measured on {found.machine['cpu']}, and this is {machine['cpu']}: seconds of two "
            "machines cannot be compared; give another folder"
        )
    return found
