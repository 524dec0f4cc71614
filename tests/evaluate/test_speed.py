"""A bound on sanity, not a target: two-stage attention must not lose to PyTorch's fused attention at 8192 tokens."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iceformer
from iceformer import kernels
from iceformer.evaluate.shapes import ModelShape, write_random_model

LENGTH, ROUNDS = 8192, 5


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.slow
def test_faster_than_fused_dense_attention_at_8192_tokens(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if not kernels.register():
        pytest.skip("the native kernels are not built")
    shape = ModelShape(layers=2, vocab=512)
    source = write_random_model(tmp_path / "source", shape, LENGTH, "float32")
    checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
    artifact = iceformer.compile(
        checkpoint, tmp_path / "artifact", buckets=(LENGTH,), attention=iceformer.TwoStage(budget=1024)
    )
    session = iceformer.load(artifact)
    ids = np.random.default_rng(0).integers(0, shape.vocab, LENGTH).astype(np.int32)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    tokens = torch.from_numpy(ids.astype(np.int64))[None]

    def theirs() -> Any:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def ours() -> Any:
        return session.generate(ids, max_new_tokens=1).ids

    theirs()
    ours()
    rounds = [(seconds(theirs), seconds(ours)) for _ in range(ROUNDS)]
    dense, two_stage = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert dense / two_stage > 1, f"PyTorch took {dense:.2f} s, two-stage attention {two_stage:.2f} s"
