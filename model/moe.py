"""Mixture of experts: a router and gated MLPs, of which each token takes the few with the highest probability.

The pairs of a token and one of its experts are sorted by expert and cut into blocks of rows with one expert; a loop
runs over the blocks that there are. So every pair is computed, and an expert without tokens is not read.
Sources: Mixtral (Jiang et al., arXiv 2401.04088); transformers' `modeling_mixtral.py` and `modeling_qwen3_moe.py`,
whose outputs these equal.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from ..attention.ops import matmul
from .modules import ACTIVATIONS, Linear

# More rows pad more, fewer read an expert's weights more often; XLA wants at least 8 for its bfloat16 product.
_LEAST_ROWS, _MOST_ROWS = 8, 256

_initial = nnx.initializers.normal(0.02)


def check_experts(num_experts_per_tok: int, num_experts: int) -> None:
    """ValueError if a token goes to more experts than there are."""
    if num_experts_per_tok > num_experts:
        raise ValueError(
            f"config: num_experts_per_tok is {num_experts_per_tok}, expected at most {num_experts} experts"
        )


class SparseMoE(nnx.Module):
    """The sum over a token's experts of `weight * down(activation(gate(x)) * up(x))`.

    A token's experts are those with the highest probabilities by the router, a softmax in float32. These are the
    weights, divided by their sum if `norm_topk_prob` (which Mixtral always does).

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
        self.gate_proj = nnx.Param(_initial(rngs.params(), inwards, param_dtype))
        self.up_proj = nnx.Param(_initial(rngs.params(), inwards, param_dtype))
        self.down_proj = nnx.Param(_initial(rngs.params(), outwards, param_dtype))
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act

    def __call__(self, x: Float[Array, "*rows hidden_size"]) -> Float[Array, "*rows hidden_size"]:
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(tokens)
        return self._sum_of_experts(tokens, weights, experts).astype(x.dtype).reshape(x.shape)

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
        num_experts = self.gate_proj.shape[0]
        rows = _block_rows(tokens * chosen, num_experts)
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
        stacks = (self.gate_proj[...], self.up_proj[...], self.down_proj[...])
        gate, up, down = (_one_of(stack, expert) for stack in stacks)
        activated = ACTIVATIONS[self.hidden_act](matmul(x, gate)) * matmul(x, up)
        return matmul(activated.astype(x.dtype), down)


def _block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block: the power of two at or above the pairs that an expert has on average."""
    average = -(-pairs // num_experts)
    return min(max(1 << (average - 1).bit_length(), _LEAST_ROWS), _MOST_ROWS)


def _one_of(stack: Float[Array, "experts m n"], expert: Int[Array, ""]) -> Float[Array, "m n"]:
    # XLA slices bfloat16 in float32. Unless the stack seems to change from block to block, it converts, before the
    # loop, the stack as a whole: every expert would be read and written at each call.
    stack, expert = lax.optimization_barrier((stack, expert))
    return lax.dynamic_index_in_dim(stack, expert, keepdims=False)
