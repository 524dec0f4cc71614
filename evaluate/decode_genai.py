"""OpenVINO GenAI's process in the decoding benchmark: `python decode_genai.py JSON`, in an interpreter that has it.

A file of its own that needs numpy, openvino and openvino-genai only, because that interpreter may lack iceformer.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from serving import Engine, serve

_CACHE_GIGABYTES = 2
_PROMPT_CHUNK = 2048


def prepare(job: dict[str, Any]) -> Engine:
    """The pipeline, with its own defaults for the number formats; a run is some steps of it, all rows in each."""
    import openvino  # pyright: ignore[reportMissingImports]
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = _PROMPT_CHUNK
    scheduler.cache_size = _CACHE_GIGABYTES * job["batch"]
    if job["engine"] == "openvino_genai_xattention":
        mode = genai.SparseAttentionMode.XATTENTION
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(mode=mode)
    threads = {"INFERENCE_NUM_THREADS": job["threads"]}
    pipeline = genai.ContinuousBatchingPipeline(job["gguf"], scheduler, "CPU", threads)
    shape = (job["batch"], job["length"])
    ids = np.random.default_rng(job["seed"]).integers(0, job["vocab"], shape).astype(np.int64)
    config = genai.GenerationConfig(max_new_tokens=job["length"], ignore_eos=True, do_sample=False)
    handles = []

    def step() -> int:
        """Writes a token of each row that has read its prompt; the number of these rows."""
        pipeline.step()
        written = [handle for handle in handles if handle.can_read()]
        for handle in written:
            handle.read()
        return len(written)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(job["new_tokens"]):
            rows = step()
            if rows != job["batch"]:
                raise RuntimeError(f"a step wrote to {rows} rows, expected all {job['batch']}")
        return (time.perf_counter() - start) / job["new_tokens"]

    def warm_up() -> None:
        handles.extend(
            pipeline.add_request(row, openvino.Tensor(ids[row : row + 1]), config) for row in range(len(ids))
        )
        while step() < job["batch"]:
            pass
        run()

    return Engine(run, warm_up)


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    serve(described["output"], lambda: prepare(described))
