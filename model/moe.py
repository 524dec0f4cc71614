"""Mixture of experts: a router and gated MLPs, of which each token takes the few with the highest probability.

The pairs of a token and one of its experts are sorted by expert and cut into blocks of rows with one expert; a loop
runs over the blocks that there are. So every pair is computed, and an expert without tokens is not read.

The experts' weights are stacks, or linear layers of each expert, which can be rounded: the native kernel reads those of
one where they lie, and XLA copies one expert at a time.
Sources: Mixtral (Jiang et al., arXiv 2401.04088); transformers' `modeling_mixtral.py` and `modeling_qwen3_moe.py`,
whose outputs these equal.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from ..attention.ops import matmul
from .modules import ACTIVATIONS, Linear, show_input
from .products import multiply_by_one_of

# More rows pad more, fewer read an expert's weights more often; XLA wants at least 8 for its bfloat16 product.
_LEAST_ROWS, _MOST_ROWS = 8, 256
# The kernel reads an expert once for a few rows. With one, XLA would sum otherwise than with more, and a token checked
# beside others would not have the bits that it has alone.
_LEAST_SEPARATE_ROWS = 2

_initial = nnx.initializers.normal(0.02)


def check_experts(num_experts_per_tok: int, num_experts: int) -> None:
    """ValueError if a token goes to more experts than there are."""
    if num_experts_per_tok > num_experts:
        raise ValueError(
            f"config: num_experts_per_tok is {num_experts_per_tok}, expected at most {num_experts} experts"
        )


class Expert(nnx.Module):
    """One gated MLP, whose gate and up projection are one layer: the outputs of the one, then those of the other."""

    def __init__(self, gate_up_proj: Linear, down_proj: Linear, *, hidden_act: str) -> None:
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.hidden_act = hidden_act

    def activated(self, x: Float[Array, "rows hidden_size"]) -> Float[Array, "rows intermediate_size"]:
        """What the down projection takes."""
        return _activated(self.gate_up_proj.in_float32(x), self.hidden_act).astype(x.dtype)


def separate_experts(model: nnx.Module) -> None:
    """Gives all experts of a model layers of their own, so that the native kernel need not copy what it reads."""
    for _, node in [*nnx.iter_graph(model)]:
        if isinstance(node, SparseMoE) and node.experts is None:
            node.separate(lambda number, expert: None)


class SparseMoE(nnx.Module):
    """The sum over a token's experts of `weight * down(activation(gate(x)) * up(x))`.

    A token's experts are those with the highest probabilities by the router, a softmax in float32. These are the
    weights, divided by their sum if `norm_topk_prob` (which Mixtral always does).

    Attributes:
        gate_proj, up_proj, down_proj: the stacks of all experts' weights; None after `separate`.
        experts: one by one, after it; None before.

    Raises:
        ValueError: more experts per token than there are.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        hidden_act: str,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        if num_experts_per_tok > num_experts:
            raise ValueError(
                f"config: num_experts_per_tok is {num_experts_per_tok}, expected at most the number of experts, "
                f"{num_experts}"
            )
        inwards, outwards = (num_experts, hidden_size, intermediate_size), (num_experts, intermediate_size, hidden_size)
        self.gate = Linear(hidden_size, num_experts, use_bias=False, rngs=rngs, param_dtype=param_dtype)
        self.gate_proj: nnx.Param | None = nnx.data(nnx.Param(_initial(rngs.params(), inwards, param_dtype)))
        self.up_proj: nnx.Param | None = nnx.data(nnx.Param(_initial(rngs.params(), inwards, param_dtype)))
        self.down_proj: nnx.Param | None = nnx.data(nnx.Param(_initial(rngs.params(), outwards, param_dtype)))
        self.experts: nnx.List[Expert] | None = nnx.data(None)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act

    def __call__(self, x: Float[Array, "*rows hidden_size"]) -> Float[Array, "*rows hidden_size"]:
        tokens = x.reshape(-1, x.shape[-1])
        show_input((self,), tokens)
        weights, experts = self.route(tokens)
        return self._sum_of_experts(tokens, weights, experts).astype(x.dtype).reshape(x.shape)

    def separate(self, finish: Callable[[int, Expert], None]) -> None:
        """Gives every expert layers of its own in place of its part of the stacks.

        Args:
            finish: is given each expert with its number as soon as it is there, to round it before the next one.
        """
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        assert gate is not None
        assert up is not None
        assert down is not None
        self.experts = nnx.List()
        for number in range(self.num_experts):
            gate_up = jnp.concatenate([gate[number], up[number]], axis=-1)
            expert = Expert(Linear.of(gate_up), Linear.of(down[number]), hidden_act=self.hidden_act)
            finish(number, expert)
            self.experts.append(expert)
        self.gate_proj = self.up_proj = self.down_proj = nnx.data(None)

    def route(
        self, x: Float[Array, "tokens hidden_size"]
    ) -> tuple[Float32[Array, "tokens chosen"], Int32[Array, "tokens chosen"]]:
        """Weights and indices of each token's experts, the most probable first."""
        probabilities = jax.nn.softmax(self.gate.in_float32(x), axis=-1)
        weights, experts = lax.top_k(probabilities, self.num_experts_per_tok)
        if self.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def _sum_of_experts(
        self,
        x: Float[Array, "tokens hidden_size"],
        weights: Float32[Array, "tokens chosen"],
        experts: Int32[Array, "tokens chosen"],
    ) -> Float32[Array, "tokens hidden_size"]:
        tokens, chosen = experts.shape
        num_experts = self.num_experts
        rows = _block_rows(tokens * chosen, num_experts, _LEAST_ROWS if self.experts is None else _LEAST_SEPARATE_ROWS)
        # Pairs by expert, padded so that a block never reaches past them.
        order = jnp.pad(jnp.argsort(experts.reshape(-1), stable=True), (0, rows)).astype(jnp.int32)
        counts = jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        ends, block_ends = jnp.cumsum(counts), jnp.cumsum((counts + rows - 1) // rows)

        def add_block(block: Int32[Array, ""], total: Array) -> Array:
            expert = jnp.sum(block_ends <= block, dtype=jnp.int32)
            blocks_before = block_ends[expert] - (counts[expert] + rows - 1) // rows
            start = ends[expert] - counts[expert] + (block - blocks_before) * rows
            pairs = lax.dynamic_slice(order, (start,), (rows,))
            token = pairs // chosen
            output = self._expert(expert, x.at[token].get(mode="clip")) * weights.reshape(-1)[pairs][:, None]
            # The last block of an expert reaches into what belongs to others: that is dropped.
            token = jnp.where(start + jnp.arange(rows) < ends[expert], token, tokens)
            return total.at[token].add(output, mode="drop")

        return lax.fori_loop(0, block_ends[-1], add_block, jnp.zeros(x.shape, jnp.float32))

    def _expert(
        self, expert: Int32[Array, ""], x: Float[Array, "rows hidden_size"]
    ) -> Float32[Array, "rows hidden_size"]:
        if self.experts is not None:
            gate_up = _by_one_of([each.gate_up_proj for each in self.experts], expert, x)
            activated = _activated(gate_up, self.hidden_act)
            return _by_one_of([each.down_proj for each in self.experts], expert, activated.astype(x.dtype))
        stacks = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (_one_of(stack[...], expert) for stack in stacks if stack is not None)
        activated = ACTIVATIONS[self.hidden_act](matmul(x, gate)) * matmul(x, up)
        return matmul(activated.astype(x.dtype), down)


def _activated(gate_up: Float32[Array, "rows both_sizes"], hidden_act: str) -> Float32[Array, "rows intermediate_size"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[hidden_act](gate) * up


def _block_rows(pairs: int, num_experts: int, least: int) -> int:
    """Rows of a block: the power of two at or above the pairs that an expert has on average."""
    average = max(-(-pairs // num_experts), 1)
    return min(max(1 << (average - 1).bit_length(), least), _MOST_ROWS)


def _by_one_of(
    layers: Sequence[Linear], number: Int32[Array, ""], x: Float[Array, "rows in_features"]
) -> Float32[Array, "rows out_features"]:
    """What one of several layers without biases makes of x."""
    scales = [None if layer.scale is None else layer.scale[...] for layer in layers]
    return multiply_by_one_of(x, number, [layer.weight for layer in layers], scales, layers[0].levels)


def _one_of(stack: Float[Array, "experts m n"], expert: Int[Array, ""]) -> Float[Array, "m n"]:
    # XLA slices bfloat16 in float32. Unless the stack seems to change from block to block, it converts, before the
    # loop, the stack as a whole: every expert would be read and written at each call.
    stack, expert = lax.optimization_barrier((stack, expert))
    return lax.dynamic_index_in_dim(stack, expert, keepdims=False)
