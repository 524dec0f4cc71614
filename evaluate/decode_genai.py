"""OpenVINO GenAI's process in the decoding benchmark: `python decode_genai.py JSON`, in an interpreter that has it.

A file of its own that needs numpy, openvino and openvino-genai only, because that interpreter may lack iceformer.
"""

import json
import sys
from typing import Any

import numpy as np
from serving import Engine, serve

_CACHE_GIGABYTES = 2
_PROMPT_CHUNK = 2048


def prepare(job: dict[str, Any]) -> Engine:
    """The pipeline, with its own defaults for the number formats, and a generation as what is timed."""
    import openvino  # pyright: ignore[reportMissingImports]
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = _PROMPT_CHUNK
    scheduler.cache_size = _CACHE_GIGABYTES
    if job["engine"] == "openvino_genai_xattention":
        mode = genai.SparseAttentionMode.XATTENTION
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(mode=mode)
    pipeline = genai.LLMPipeline(job["gguf"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=job["threads"])
    ids = np.random.default_rng(job["seed"]).integers(0, job["vocab"], (1, job["length"])).astype(np.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    config = genai.GenerationConfig(max_new_tokens=job["new_tokens"], ignore_eos=True, do_sample=False)

    def run() -> float:
        return pipeline.generate(inputs, config).perf_metrics.get_tpot().mean / 1e3

    def warm_up() -> None:
        run()

    return Engine(run, warm_up)


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    serve(described["output"], lambda: prepare(described))
