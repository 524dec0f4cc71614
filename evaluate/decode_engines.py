"""The engines that decode after a long prompt, ours and others', on the same model and token ids.

`python -m iceformer.evaluate.decode_engines JSON` is the process of the engine that the JSON describes, see
`serving.py`. The prompts are read once, to warm up. A run writes the next tokens of each row, and its seconds are those
of a token; only llama.cpp, whose benchmark keeps nothing, reads the prompt again for each run.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..deploy.manifest import TAIL
from .processes import Job
from .serving import Engine, serve

OURS = ("two_stage", "exact", "selection")
GENAI = ("openvino_genai", "openvino_genai_xattention")


@dataclass(frozen=True, kw_only=True)
class DecodeJob(Job):
    """New tokens after `length` random tokens, in each of `batch` rows.

    Attributes:
        vocab: ids are below this.
        new_tokens: of each row in a run.
        rounds: runs that are timed, after the one that warms up.
        batch: rows that decode together.
        form: what the engine opens: an artifact of ours, or a Hugging Face folder.
        gguf: the model as a GGUF file, for engines that read that.
        python: interpreter of the process.
        llama_bench: the executable, for llama_cpp.
    """

    module: ClassVar[str] = "iceformer.evaluate.decode_engines"

    vocab: int
    new_tokens: int
    rounds: int = 3
    batch: int = 1
    form: str = ""
    gguf: str = ""
    python: str = sys.executable
    llama_bench: str = ""

    @property
    def command(self) -> list[str]:
        """The module, or for OpenVINO GenAI a file that needs nothing of this package."""
        if self.engine in GENAI:
            return [self.python, str(Path(__file__).with_name("decode_genai.py"))]
        return super().command


def prompts(job: DecodeJob) -> NDArray[np.int32]:
    """Random ids [batch, length], the same for every engine."""
    return np.random.default_rng(job.seed).integers(0, job.vocab, (job.batch, job.length)).astype(np.int32)


def written_tokens(new_tokens: int, rounds: int, batch: int, length: int) -> int:
    """Tokens that a row writes at most.

    Args:
        new_tokens: of a run.
        rounds: runs that are timed; one more warms up.
        batch: rows. The first writes while the prompts of the others are read, a piece a step.
        length: of a prompt.
    """
    return 2 + new_tokens * (rounds + 1) + (batch - 1) * -(-length // TAIL)


def ours(job: DecodeJob) -> Engine:
    """An artifact of ours. All rows write in the steps that count."""
    from ..deploy.artifact import open_artifact
    from ..deploy.engine import Engine as Requests
    from ..deploy.engine import Request, RequestLost, TokenWritten
    from ..deploy.runner import Runner

    artifact = open_artifact(Path(job.form))
    model = replace(artifact.manifest.model, eos_token_ids=())  # random ids may be followed by any token
    requests = Requests(Runner(replace(artifact, manifest=replace(artifact.manifest, model=model))))
    most = written_tokens(job.new_tokens, job.rounds, job.batch, job.length)

    def step() -> Iterator[int]:
        """Handles of the rows that a step wrote to."""
        for event in requests.step():
            if isinstance(event, RequestLost):
                raise RuntimeError(event.why)
            if isinstance(event, TokenWritten):
                yield event.handle

    def read() -> None:
        reading = {requests.add(Request(ids, most, speculate=False)) for ids in prompts(job)}
        while reading:
            reading.difference_update(step())

    return _engine(read, lambda: sum(1 for _ in step()), job)


def sdpa(job: DecodeJob) -> Engine:
    """transformers with PyTorch's fused attention, step by step with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.form, dtype=getattr(torch, job.dtype), attn_implementation="sdpa", local_files_only=True
    )
    result: Any = None

    def call(ids: torch.Tensor, **options: Any) -> int:
        nonlocal result
        with torch.inference_mode():
            result = model(ids, use_cache=True, logits_to_keep=1, **options)
        return len(ids)

    return _engine(
        lambda: call(torch.from_numpy(prompts(job).astype(np.int64))),
        lambda: call(result.logits[:, -1:].argmax(-1), past_key_values=result.past_key_values),
        job,
    )


def llama_cpp(job: DecodeJob) -> Engine:
    """llama.cpp by its own benchmark, which fills the cache up to the depth before it times new tokens."""
    options = {
        "-m": job.gguf,
        "-p": 0,
        "-n": job.new_tokens,
        "-d": job.length,
        "-t": job.threads,
        "-r": 1,
        "-o": "json",
    }
    command = [job.llama_bench, *(str(part) for option in options.items() for part in option)]

    def run() -> float:
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        (test,) = json.loads(printed)
        return test["avg_ns"] / test["n_gen"] / 1e9

    def warm_up() -> None:
        run()

    return Engine(run, warm_up)


def _engine(read: Callable[[], object], step: Callable[[], int], job: DecodeJob) -> Engine:
    """An engine that reads its prompts and some tokens more to warm up.

    It has nothing to compare: after random ids, rounding decides which token is likeliest.

    Args:
        read: reads the prompts of all rows.
        step: writes a token of each row, and gives the number of rows.
        job: what is decoded.
    """

    def run() -> float:
        start = time.perf_counter()
        for _ in range(job.new_tokens):
            rows = step()
            if rows != job.batch:
                raise RuntimeError(f"a step wrote to {rows} rows, expected all {job.batch}")
        return (time.perf_counter() - start) / job.new_tokens

    def warm_up() -> None:
        read()
        run()

    return Engine(run, warm_up)


ENGINES: dict[str, Callable[[DecodeJob], Engine]] = {
    **dict.fromkeys(OURS, ours),
    "sdpa": sdpa,
    "llama_cpp": llama_cpp,
}
"""Engines by name, but for those of `GENAI`."""
DECODE_ENGINES = ("two_stage", "exact", "selection", "sdpa", *GENAI, "llama_cpp")
"""All names."""


def main(text: str) -> None:
    """Runs one engine's process."""
    job = DecodeJob(**json.loads(text))
    serve(job.output, lambda: ENGINES[job.engine](job))


if __name__ == "__main__":
    main(sys.argv[1])
