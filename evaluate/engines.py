"""One engine in a process of its own, so that its memory is its own and engines can be timed in turn.

`python -m iceformer.evaluate.engines JSON` prepares and warms up the engine that the JSON describes and prints one line
(`{"ready": seconds}`). Then each line on stdin times one prefill and prints `{"seconds": ...}`, and the end of stdin
ends it with `{"peak_bytes": ...}`. What the engine's libraries print goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Prefill = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """What an engine process is to time: the prefill of `length` random tokens, up to the logits of the last one.

    Attributes:
        engine: a key of `ENGINES`.
        source: Hugging Face folder of the model.
        artifact: for our own engines, the compiled artifact.
        length: tokens of the prompt.
        dtype: "float32" or "bfloat16".
        threads: of the engine.
        seed: of the token ids.
    """

    engine: str
    source: str
    artifact: str
    length: int
    dtype: str
    threads: int
    seed: int = 0


def ours(job: Job, ids: np.ndarray) -> Prefill:
    """An artifact of ours, whatever its attention is."""
    from ..deploy.session import load

    session = load(job.artifact)
    return lambda: session.generate(ids, max_new_tokens=1).ids


def _transformers(job: Job, ids: np.ndarray, implementation: str) -> Prefill:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=getattr(torch, job.dtype), attn_implementation=implementation
    )
    tokens = torch.from_numpy(ids.astype(np.int64))[None]

    def prefill() -> Any:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return prefill


def transformers_sdpa(job: Job, ids: np.ndarray) -> Prefill:
    """transformers with PyTorch's fused attention, what people use today."""
    return _transformers(job, ids, "sdpa")


def transformers_eager(job: Job, ids: np.ndarray) -> Prefill:
    """transformers with attention that writes the [n, n] scores out: IceFormer's own baseline."""
    return _transformers(job, ids, "eager")


ENGINES: dict[str, Callable[[Job, np.ndarray], Prefill]] = {
    "two_stage": ours,
    "exact": ours,
    "floor": ours,
    "sdpa": transformers_sdpa,
    "eager": transformers_eager,
}
"""Engines by name. `floor` is our model with the attention left out: what its dense layers cost."""


def main(text: str) -> None:
    """Runs one engine process."""
    job = Job(**json.loads(text))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)

    def answer(**fields: float) -> None:
        answers.write(json.dumps(fields) + "\n")

    with redirect_stdout(sys.stderr):
        config = json.loads((Path(job.source) / "config.json").read_text())
        ids = np.random.default_rng(job.seed).integers(0, config["vocab_size"], job.length).astype(np.int32)
        start = time.perf_counter()
        prefill = ENGINES[job.engine](job, ids)
        prefill()
        answer(ready=time.perf_counter() - start)
        for _ in sys.stdin:
            start = time.perf_counter()
            prefill()
            answer(seconds=time.perf_counter() - start)
    answer(peak_bytes=_peak_bytes())


def _peak_bytes() -> int:
    """The largest resident memory of this process; getrusage would count that of its parent before exec too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(sys.argv[1])
