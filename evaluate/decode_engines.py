"""The engines that decode after a long prompt, ours and others', on the same model and token ids.

`python -m iceformer.evaluate.decode_engines JSON` is the process of the engine that the JSON describes, see
`serving.py`. One run is a whole generation; its seconds are those of a token, from the first new token to the last.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .processes import Job
from .serving import Engine, serve

OURS = ("two_stage", "exact", "selection")
GENAI = ("openvino_genai", "openvino_genai_xattention")


@dataclass(frozen=True, kw_only=True)
class DecodeJob(Job):
    """New tokens after `length` random tokens, in each of `batch` rows.

    Attributes:
        vocab: ids are below this.
        new_tokens: of each row, at least 2.
        batch: rows that decode together.
        form: what the engine opens: an artifact of ours, or a Hugging Face folder.
        gguf: the model as a GGUF file, for engines that read that.
        python: interpreter of the process.
        llama_bench: the executable, for llama_cpp.
    """

    module: ClassVar[str] = "iceformer.evaluate.decode_engines"

    vocab: int
    new_tokens: int
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


def extra_tokens(batch: int, length: int, chunk: int) -> int:
    """Tokens that the first row writes at most while the prompts of the others are read, a chunk a step."""
    return (batch - 1) * -(-length // chunk)


def ours(job: DecodeJob) -> Engine:
    """An artifact of ours. All rows write in the steps that count."""
    from ..deploy.artifact import open_artifact
    from ..deploy.engine import Engine as Requests
    from ..deploy.engine import Request, RequestLost, TokenWritten
    from ..deploy.runner import Runner

    artifact = open_artifact(Path(job.form))
    model = replace(artifact.manifest.model, eos_token_ids=())  # random ids may be followed by any token
    requests = Requests(Runner(replace(artifact, manifest=replace(artifact.manifest, model=model))))
    most = job.new_tokens + extra_tokens(job.batch, job.length, artifact.manifest.buckets[0].chunk)

    def run() -> float:
        reading = {requests.add(Request(ids, most, speculate=False)) for ids in prompts(job)}
        handles = tuple(reading)
        while reading:
            for event in requests.step():
                if isinstance(event, RequestLost):
                    raise RuntimeError(event.why)
                if isinstance(event, TokenWritten):
                    reading.discard(event.handle)
        # The step that ends a prompt also writes its second token.
        start = time.perf_counter()
        steps = job.new_tokens - 2
        for _ in range(steps):
            requests.step()
        seconds = (time.perf_counter() - start) / steps
        for handle in handles:
            requests.cancel(handle)
        return seconds

    return _warmed_up_by(run)


def sdpa(job: DecodeJob) -> Engine:
    """transformers with PyTorch's fused attention, step by step with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.form, dtype=getattr(torch, job.dtype), attn_implementation="sdpa", local_files_only=True
    )
    ids = torch.from_numpy(prompts(job).astype(np.int64))

    def run() -> float:
        with torch.inference_mode():
            result = model(ids, use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(job.new_tokens - 1):
                token = result.logits[:, -1:].argmax(-1)
                result = model(token, past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)
            return (time.perf_counter() - start) / (job.new_tokens - 1)

    return _warmed_up_by(run)


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

    return _warmed_up_by(run)


def _warmed_up_by(run: Callable[[], float]) -> Engine:
    """An engine that has nothing to compare: after random ids, rounding decides which token is likeliest."""

    def warm_up() -> None:
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
