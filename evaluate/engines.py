"""The engines that prefill a prompt, ours and others', on the same weights and token ids.

`python -m iceformer.evaluate.engines JSON` is the process of the engine that the JSON describes, see `processes.py`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .processes import Job
from .serving import Engine, serve

OPENVINO_MODEL = "model.xml"
ONNX_MODEL = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class PrefillJob(Job):
    """The prefill of `length` random tokens, up to the logits of the last one.

    Attributes:
        source: Hugging Face folder of the model.
        form: folder with the model in the engine's own form: for our own engines, the compiled artifact.
    """

    module: ClassVar[str] = "iceformer.evaluate.engines"

    source: str
    form: str


def ours(job: PrefillJob, ids: NDArray[np.int32]) -> Engine:
    """An artifact of ours, whatever its attention is."""
    from ..deploy.session import load

    session = load(job.form, cache_ram=0)
    # What `generate` computes for its first token, before it draws; the session keeps logits to itself.
    return Engine(lambda: session.generate(ids, max_new_tokens=1), lambda: session._engine.logits(ids))


def sdpa(job: PrefillJob, ids: NDArray[np.int32]) -> Engine:
    """transformers with PyTorch's fused attention, what people use today."""
    return _transformers(job, ids, "sdpa")


def eager(job: PrefillJob, ids: NDArray[np.int32]) -> Engine:
    """transformers with attention that writes the [heads, n, n] scores out: IceFormer's own baseline."""
    return _transformers(job, ids, "eager")


def _transformers(job: PrefillJob, ids: NDArray[np.int32], implementation: str) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=getattr(torch, job.dtype), attn_implementation=implementation, local_files_only=True
    )
    tokens = torch.from_numpy(ids.astype(np.int64))[None]

    def prefill() -> Any:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1]

    return Engine(prefill, lambda: prefill().float().numpy())


def openvino(job: PrefillJob, ids: NDArray[np.int32]) -> Engine:
    """OpenVINO's CPU plugin, told to compute in the job's dtype."""
    from openvino import Core

    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.dtype],
        "INFERENCE_NUM_THREADS": job.threads,
    }
    model = Core().compile_model(Path(job.form) / OPENVINO_MODEL, "CPU", options)
    tokens = ids.astype(np.int64)[None]
    return Engine(lambda: model(tokens), lambda: np.array(model(tokens)[0][0]))


def onnxruntime(job: PrefillJob, ids: NDArray[np.int32]) -> Engine:
    """ONNX Runtime's CPU provider with its fused attention."""
    from onnxruntime import InferenceSession
    from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = job.threads
    session = InferenceSession(Path(job.form) / ONNX_MODEL, options, providers=["CPUExecutionProvider"])
    inputs = {"ids": ids.astype(np.int64)[None]}
    return Engine(lambda: session.run(None, inputs), lambda: np.asarray(session.run(None, inputs)[0])[0])


ENGINES: dict[str, Callable[[PrefillJob, NDArray[np.int32]], Engine]] = {
    "two_stage": ours,
    "exact": ours,
    "floor": ours,
    "sdpa": sdpa,
    "eager": eager,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}
"""Engines by name. `floor` is our model with the attention left out: what its dense layers cost."""

UNSUPPORTED = {("onnxruntime", "bfloat16"): "ONNX Runtime has no bfloat16 kernels for CPUs"}
"""Reasons not to start an engine with a dtype."""


def main(text: str) -> None:
    """Runs one engine's process."""
    job = PrefillJob(**json.loads(text))

    def prepare() -> Engine:
        config = json.loads((Path(job.source) / "config.json").read_text())
        ids = np.random.default_rng(job.seed).integers(0, config["vocab_size"], job.length).astype(np.int32)
        return ENGINES[job.engine](job, ids)

    serve(job.output, prepare)


if __name__ == "__main__":
    main(sys.argv[1])
