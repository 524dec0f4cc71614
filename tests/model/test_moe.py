"""The mixture of experts against transformers' blocks, rounded against its weights multiplied out, and what its
compiled form needs of memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from iceformer import kernels
from iceformer.model.activations import LEVELS
from iceformer.model.modules import Linear
from iceformer.model.moe import Expert, SparseMoE
from iceformer.model.panels import unpack
from iceformer.model.products import FEW_ROWS
from iceformer.model.rounding import round_experts, round_weights

from ..few import few
from .test_products import in_form

HIDDEN, INTERMEDIATE = 24, 40
# XLA, and the kernels' widest instruction set. That all of them multiply alike is tested elsewhere.
FORMS = ("", *kernels.instruction_sets()[:1])


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
) -> tuple[Any, Any]:
    """The module and transformers' block with the same random parameters, representable in `dtype`."""
    import torch

    torch.manual_seed(0)
    reference = make(experts, chosen, norm_topk_prob).eval()
    module: Any = SparseMoE(
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


def outputs(module: Any, reference: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def random_mixture(hidden: int, intermediate: int, experts: int, chosen: int = 2, dtype: str = "float32") -> Any:
    return SparseMoE(
        hidden,
        intermediate,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        hidden_act="silu",
        rngs=nnx.Rngs(0),
        param_dtype=jnp.dtype(dtype),
    )


Projections = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Gate, up and down projection of an expert."""


def weights_of(module: Any) -> list[Projections]:
    """Those of each expert, multiplied out."""

    def kernel(linear: Linear, features: int) -> np.ndarray:
        if linear.scale is None:
            return np.asarray(linear.kernel[...], np.float64)
        scale = np.asarray(linear.scale[...], np.float64)
        weights = np.asarray(unpack(linear.kernel[...], features), np.float64)[:, : scale.shape[1]]
        return weights * np.repeat(scale, features // len(scale), axis=0)

    def projections(expert: Expert) -> Projections:
        gate, up = np.split(kernel(expert.gate_up_proj, module.gate.kernel.shape[0]), 2, axis=1)
        return gate, up, kernel(expert.down_proj, gate.shape[1])

    return [projections(expert) for expert in module.experts]


def in_numpy(module: SparseMoE, weights: list[Projections], x: jax.Array) -> np.ndarray:
    """What a mixture with the module's router and these weights makes of x."""
    shares, chosen = (np.asarray(each) for each in module.route(x))
    result = np.zeros(x.shape)
    for (row, place), number in np.ndenumerate(chosen):
        gate, up, down = weights[number]
        inputs = np.asarray(x[row], np.float64)
        gated = inputs @ gate
        result[row] += shares[row, place] * ((gated / (1 + np.exp(-gated)) * (inputs @ up)) @ down)
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("weights", "tokens", "sizes"),
    [
        ("int4", 1, (64, 96, 5)),
        ("int8", 70, (40, 52, 4)),
        *(
            pytest.param(weights, tokens, (64, 96, 3), marks=pytest.mark.slow)
            for weights in ("bfloat16", "int8", "int4")
            for tokens in (1, 3, 9, 70, 800)
        ),
    ],
    ids=str,
)
def test_rounded_experts_equal_their_weights_multiplied_out(
    form: str, weights: str, tokens: int, sizes: tuple[int, int, int]
) -> None:
    module, x = random_mixture(*sizes), jnp.asarray(np.random.default_rng(0).standard_normal((tokens, sizes[0])))
    stacks = [np.asarray(stack[...]) for stack in (module.gate_proj, module.up_proj, module.down_proj)]
    exact = in_numpy(module, list(zip(*stacks, strict=True)), x)
    round_experts(module, weights)
    rounded = in_form(form, lambda module, x: module(x), module, x)
    expected = in_numpy(module, weights_of(module), x)
    largest = np.abs(exact).max()
    np.testing.assert_allclose(rounded, expected, atol=2e-5 * largest)
    assert 0 < np.abs(exact - expected).max() < 0.3 * largest


@pytest.mark.parametrize("form", [FORMS[-1], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[:-1])])
@pytest.mark.parametrize("activations", ["int8", pytest.param("int16", marks=pytest.mark.slow)])
def test_blocks_of_more_than_a_few_rows_round_their_inputs(form: str, activations: str) -> None:
    """As linear layers do."""
    module = random_mixture(64, 128, 4)
    plain, rounded = round_weights(module, "int8"), round_weights(module, "int8", activations)
    assert rounded.experts[0].gate_up_proj.levels == rounded.experts[3].down_proj.levels == LEVELS[activations]
    # Each the same router, whose choice is not in question.
    plain.gate = rounded.gate = module.gate

    def outputs(module: Any, x: jax.Array) -> np.ndarray:
        return np.asarray(in_form(form, lambda module, x: module(x), module, x))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((100, 64)), jnp.float32)
    before, after = outputs(plain, x), outputs(rounded, x)
    change = np.abs(before - after).max() / np.abs(before).max()
    assert 1e-2 / LEVELS[activations] < change < 10 / LEVELS[activations]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_few_tokens_stay_as_they_are(form: str) -> None:
    module = random_mixture(64, 128, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((FEW_ROWS, 64)), jnp.float32)
    plain, rounded = (
        in_form(form, lambda module, x: module(x), round_weights(module, "int8", activations), x)
        for activations in ("same", "int8")
    )
    np.testing.assert_array_equal(plain, rounded)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_no_token_is_routed_to_are_not_multiplied(form: str) -> None:
    module = round_weights(random_mixture(64, 128, 8), "int8")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.float32)
    expected = in_form(form, lambda module, x: module(x), module, x)
    chosen = set(np.asarray(module.route(x)[1]).ravel().tolist())
    others = [number for number in range(8) if number not in chosen]
    assert others
    for number in others:
        module.experts[number].gate_up_proj.scale[...] *= jnp.nan
    np.testing.assert_array_equal(in_form(form, lambda module, x: module(x), module, x), expected)


def temporary_bytes(form: str, module: Any, x: Any) -> int:
    """What a call allocates beside its arguments and results."""
    with kernels.using(form) if form else kernels.disabled():
        # A function of its own, lest another form's trace be taken.
        memory: Any = jax.jit(lambda module, x: module(x)).lower(module, x).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(("weights", "tokens"), [("int8", 64), pytest.param("int4", 1, marks=pytest.mark.slow)])
def test_rounded_weights_are_not_copied_by_the_kernel(weights: str, tokens: int) -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")
    hidden, intermediate = 256, 512
    module = round_weights(random_mixture(hidden, intermediate, 8), weights)
    x = jnp.zeros((1, tokens, hidden))
    kernel = module.experts[0].gate_up_proj.kernel[...].nbytes
    memory = [temporary_bytes(form, module, x) for form in ("", kernels.instruction_sets()[0])]
    # A block's gate and up projection, its expert's input and output, and everyone's.
    rows = 2 * 32 * 4 * (2 * intermediate + 2 * hidden) if tokens > 1 else 16384
    assert memory[1] < rows < memory[0]
    # XLA copies one expert at a time, and makes floats of a part of it.
    assert memory[0] < 2 * kernel + 2 * 256 * 512 * 4 + rows


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tokens", few([1, 64], [64]))
def test_weights_are_copied_one_expert_at_a_time(tokens: int, dtype: DTypeLike) -> None:
    hidden, intermediate, experts = 256, 512, 64
    module = nnx.eval_shape(lambda: random_mixture(hidden, intermediate, experts, dtype=jnp.dtype(dtype).name))
    x = jax.ShapeDtypeStruct((1, tokens, hidden), dtype)
    one_expert = 3 * hidden * intermediate * jnp.dtype(dtype).itemsize
    assert temporary_bytes("", module, x) < 2 * one_expert


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
