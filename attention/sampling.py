"""A seeded uniform sample of the keys that a selection leaves out, which stands in for all of them.

Source: vAttention (Desai et al., arXiv 2510.05688). With b keys drawn of n, each drawn key's softmax weight counts
n / b times, that is, its logit is raised by log(n / b). Then the sums of weights and of weighted values are unbiased,
and the spread of the drawn weights says how far the sum of the weights may be off.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

_GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio, which keeps the draws' inputs apart."""


class Sample(NamedTuple):
    """Keys drawn of those that are left out.

    Attributes:
        position: of each; one key may be drawn several times.
        drawn: whether it counts: where no more keys are left out than may be drawn, each is taken once.
        left: how many keys are left out.
    """

    position: Int[Array, " size"]
    drawn: Bool[Array, " size"]
    left: Int[Array, ""]

    def raised(self) -> Float32[Array, ""]:
        """What is added to the logits of the drawn keys."""
        return jnp.log(jnp.maximum(self.left, 1) / jnp.maximum(jnp.sum(self.drawn), 1))


def draw(
    seed: UInt32[Array, ""],
    size: int,
    blocks: Int[Array, " most"],
    count: Int[Array, ""],
    ranked: Int[Array, ""],
    key_block: int,
) -> Sample:
    """Draws keys, with repetition, from the blocks [0, ranked) without the first `count` of `blocks`, which rise."""
    left = (ranked - count) * key_block
    number = jnp.arange(size, dtype=jnp.int32)
    # Of more than 2**32 / 1000 keys the first would be drawn a thousandth more often than the last.
    random = _mixed(seed + number.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) % jnp.maximum(left, 1).astype(jnp.uint32)
    key = jnp.where(left <= size, number, random.astype(jnp.int32))
    block = key // key_block
    # Before the i-th block that is left out lie the chosen ones with at most i left-out blocks before them.
    place = jnp.arange(blocks.shape[0], dtype=jnp.int32)
    before = (place < count) & (blocks - place <= block[:, None])
    position = (block + jnp.sum(before, axis=1, dtype=jnp.int32)) * key_block + key % key_block
    drawn = number < left
    return Sample(jnp.where(drawn, position, 0), drawn, left)


def seed_of(position: Int[Array, ""], head: Int[Array, ""]) -> UInt32[Array, ""]:
    """A seed for each position of a row and each KV head."""
    return _mixed(_mixed(position.astype(jnp.uint32)) + head.astype(jnp.uint32) * jnp.uint32(_GOLDEN))


def standard_error(
    logits: Float[Array, "size queries"], sample: Sample, lse: Float[Array, " queries"]
) -> Float32[Array, " queries"]:
    """The standard error of the estimated weight of all keys that are left out, relative to the total weight.

    Args:
        logits: of the drawn keys, not raised.
        sample: the draw.
        lse: the log of the total weight, of which the estimate is a part.
    """
    size = logits.shape[0]
    weights = jnp.exp(logits - lse)
    mean = jnp.mean(weights, axis=0)
    variance = jnp.sum(jnp.square(weights - mean), axis=0) / (size - 1)
    return jnp.where(sample.left > size, sample.left * jnp.sqrt(variance / size), 0.0)


def _mixed(x: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    """The finalizer of MurmurHash3: every bit of x changes half of the result's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
