"""The engines that compute attention alone, on the same random queries, keys and values.

`python -m iceformer.evaluate.attention_engines JSON` is the process of the engine that the JSON describes, see
`processes.py`. Arrays are [1, heads, n, head_dim]; what is written out for comparison is a sample of the queries' rows.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from .processes import Job
from .serving import Engine, serve

Arrays = tuple[Float[np.ndarray, "1 heads n head_dim"], ...]
_CALIBRATION_TOKENS = 4096
_COMPARED_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class AttentionJob(Job):
    """Attention of `length` queries over as many keys.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        causal: whether a query sees only keys up to its own position.
        attention: options of `TwoStage`, its method as an object with `name`, as `attention_to_dict` gives them.
    """

    module: ClassVar[str] = "iceformer.evaluate.attention_engines"

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    attention: dict[str, Any]


def random_arrays(job: AttentionJob) -> Arrays:
    """Normal queries, keys and values, the same in every engine."""
    rng = np.random.default_rng(job.seed)
    sizes = (job.heads, job.kv_heads, job.kv_heads)
    return tuple(rng.standard_normal((1, heads, job.length, job.head_dim), np.float32) for heads in sizes)


def ours(job: AttentionJob, arrays: Arrays) -> Engine:
    """`attend` under jit, exact or two-stage, calibrated on the first tokens of its own input."""
    import jax
    import jax.numpy as jnp

    from ..attention import Attention, Exact, KeyView, Mask, Rows, TwoStage, attend, make_method

    options = {name: value for name, value in job.attention.items() if name != "kind"}
    two_stage = TwoStage(**{**options, "method": make_method(**options["method"])})
    strategy: Attention = two_stage if job.engine == "two_stage" else Exact()
    learned = strategy.calibrate(*(array[0, :, :_CALIBRATION_TOKENS] for array in arrays[:2]))
    constants = {name: jnp.asarray(array) for name, array in learned.items()}

    @jax.jit
    def attention(query: jax.Array, key: jax.Array, value: jax.Array, constants: dict[str, jax.Array]) -> jax.Array:
        rows = Rows.whole(jnp.full(1, job.length, jnp.int32))
        return attend(strategy, query, KeyView(key, value), rows, Mask(job.causal), constants)

    inputs = [jnp.asarray(array, job.dtype) for array in arrays]
    rows = sampled_rows(job.length)
    return Engine(
        lambda: attention(*inputs, constants).block_until_ready(),
        lambda: np.asarray(attention(*inputs, constants)[0][:, rows], np.float32),
    )


def sdpa(job: AttentionJob, arrays: Arrays) -> Engine:
    """PyTorch's fused attention."""
    from torch.nn import functional

    query, key, value = _tensors(job, arrays)
    return _torch_engine(job, lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=job.causal))


def eager(job: AttentionJob, arrays: Arrays) -> Engine:
    """Attention that writes the [heads, n, n] scores out, as transformers has it."""
    import torch

    query, key, value = _tensors(job, arrays)
    mask = torch.zeros((), dtype=query.dtype)
    if job.causal:
        mask = torch.full((job.length, job.length), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)

    def attention() -> Any:
        scores = torch.matmul(query, key.transpose(2, 3)) * job.head_dim**-0.5 + mask
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)

    return _torch_engine(job, attention)


def _tensors(job: AttentionJob, arrays: Arrays) -> list[Any]:
    """The arrays in torch, keys and values repeated for the queries' heads, which is not timed."""
    import torch

    torch.set_num_threads(job.threads)
    tensors = [torch.from_numpy(array).to(getattr(torch, job.dtype)) for array in arrays]
    return [tensor.repeat_interleave(job.heads // tensor.shape[1], dim=1) for tensor in tensors]


def _torch_engine(job: AttentionJob, attention: Callable[[], Any]) -> Engine:
    import torch

    def run() -> Any:
        with torch.inference_mode():
            return attention()

    rows = sampled_rows(job.length)
    return Engine(run, lambda: run()[0][:, rows].float().numpy())


def sampled_rows(length: int) -> NDArray[np.int64]:
    """Positions of the queries whose outputs are compared."""
    return np.unique(np.linspace(0, length - 1, _COMPARED_ROWS).astype(np.int64))


ATTENTION_ENGINES: dict[str, Callable[[AttentionJob, Arrays], Engine]] = {
    "two_stage": ours,
    "exact": ours,
    "sdpa": sdpa,
    "eager": eager,
}
"""Engines by name."""


def main(text: str) -> None:
    """Runs one engine's process."""
    job = AttentionJob(**json.loads(text))
    serve(job.output, lambda: ATTENTION_ENGINES[job.engine](job, random_arrays(job)))


if __name__ == "__main__":
    main(sys.argv[1])
