"""The mixture of experts against transformers' blocks, and what its compiled form needs of memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from iceformer.model.moe import SparseMoE

from ..few import few

HIDDEN, INTERMEDIATE = 24, 40


def mixtral(experts: int, chosen: int, norm_topk_prob: bool) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    assert norm_topk_prob
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    return MixtralSparseMoeBlock(MixtralConfig(num_local_experts=experts, num_experts_per_tok=chosen, **sizes))


def qwen3(experts: int, chosen: int, norm_topk_prob: bool) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=norm_topk_prob,
    )
    return Qwen3MoeSparseMoeBlock(config)


def pair(
    make: Callable[[int, int, bool], Any], experts: int, chosen: int, norm_topk_prob: bool, dtype: DTypeLike
) -> tuple[SparseMoE, Any]:
    """The module and transformers' block with the same random parameters, representable in `dtype`."""
    import torch

    torch.manual_seed(0)
    reference = make(experts, chosen, norm_topk_prob).eval()
    module = SparseMoE(
        HIDDEN,
        INTERMEDIATE,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=norm_topk_prob,
        hidden_act="silu",
        rngs=nnx.Rngs(0),
        param_dtype=dtype,
    )

    def random(parameter: Any) -> np.ndarray:
        with torch.no_grad():
            parameter.copy_((torch.randn_like(parameter) * 0.3).bfloat16())
        return parameter.detach().numpy().swapaxes(-1, -2)

    module.gate.kernel[...] = jnp.asarray(random(reference.gate.weight), dtype)
    gate, up = np.split(random(reference.experts.gate_up_proj), 2, axis=-1)
    module.gate_proj[...] = jnp.asarray(gate, dtype)
    module.up_proj[...] = jnp.asarray(up, dtype)
    module.down_proj[...] = jnp.asarray(random(reference.experts.down_proj), dtype)
    return module, reference


def outputs(module: SparseMoE, reference: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).numpy()
    result = jax.jit(lambda module, x: module(x))(module, jnp.asarray(x, module.gate_proj.dtype))
    assert result.dtype == module.gate_proj.dtype
    return np.asarray(result, np.float32), expected


def random_tokens(*shape: int) -> np.ndarray:
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal((*shape, HIDDEN))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "experts", "chosen", "norm_topk_prob", "shape"),
    [
        pytest.param(mixtral, 8, 2, True, (1, 67), marks=pytest.mark.slow),
        (mixtral, 8, 2, True, (2, 700)),
        (mixtral, 3, 1, True, (1, 1)),
        pytest.param(qwen3, 16, 4, True, (2, 700), marks=pytest.mark.slow),
        pytest.param(qwen3, 40, 8, False, (1, 1), marks=pytest.mark.slow),
        (qwen3, 40, 8, False, (1, 67)),
        pytest.param(qwen3, 4, 4, False, (1, 67), marks=pytest.mark.slow),
        (qwen3, 1, 1, False, (2, 700)),
    ],
)
def test_equals_transformers(
    make: Callable[[int, int, bool], Any], experts: int, chosen: int, norm_topk_prob: bool, shape: tuple[int, ...]
) -> None:
    result, expected = outputs(*pair(make, experts, chosen, norm_topk_prob, jnp.float32), random_tokens(*shape))
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", few([1, 9, 257], [9]))
def test_all_tokens_to_the_same_experts(tokens: int) -> None:
    import torch

    module, reference = pair(mixtral, 8, 2, True, jnp.float32)
    x = random_tokens(1, tokens)
    # The first feature speaks against all experts but two.
    x[..., 0] = 1.0
    direction = np.full(8, -30.0, np.float32)
    direction[[2, 5]] = 0.0
    module.gate.kernel[...] = module.gate.kernel[...].at[0].set(direction)
    with torch.no_grad():
        reference.gate.weight[:, 0] = torch.from_numpy(direction)
    chosen = np.asarray(module.route(jnp.asarray(x[0]))[1])
    assert set(chosen.ravel().tolist()) == {2, 5}
    result, expected = outputs(module, reference, x)
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)


def test_tokens_do_not_depend_on_their_company() -> None:
    module, _ = pair(qwen3, 16, 4, True, jnp.float32)
    x = jnp.asarray(random_tokens(1, 300))
    run = jax.jit(lambda module, x: module(x))
    together = run(module, x)
    for index in (0, 150, 299):
        np.testing.assert_allclose(run(module, x[:, index]), together[:, index], atol=1e-5)
    np.testing.assert_array_equal(run(module, x), together)


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("tokens", few([1, 300], [300]))
def test_bfloat16_is_close(make: Callable[[int, int, bool], Any], tokens: int) -> None:
    module, reference = pair(make, 8, 2, True, jnp.bfloat16)
    result, expected = outputs(module, reference, random_tokens(1, tokens))
    error = np.abs(result - expected) / np.abs(expected).max()
    assert error.max() < 0.02
    assert error.max() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tokens", few([1, 64], [64]))
def test_weights_are_copied_one_expert_at_a_time(tokens: int, dtype: DTypeLike) -> None:
    hidden, intermediate, experts = 256, 512, 64
    module = nnx.eval_shape(
        lambda: SparseMoE(
            hidden,
            intermediate,
            num_experts=experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            hidden_act="silu",
            rngs=nnx.Rngs(0),
            param_dtype=dtype,
        )
    )
    x = jax.ShapeDtypeStruct((1, tokens, hidden), dtype)
    compiled = jax.jit(lambda module, x: module(x)).lower(module, x).compile()
    one_expert = 3 * hidden * intermediate * jnp.dtype(dtype).itemsize
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * one_expert


def test_more_experts_per_token_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok is 3, expected at most the number of experts, 2"):
        SparseMoE(
            8,
            8,
            num_experts=2,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            hidden_act="silu",
            rngs=nnx.Rngs(0),
            param_dtype=jnp.float32,
        )
