"""From hidden states to the vector of a sentence embedder: pooling, then dense layers and normalisation.

Source: the modules Pooling, Dense and Normalize of sentence-transformers, whose vectors these equal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from .modules import Linear

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""The modes of a Pooling module, in the order in which its older config concatenates them."""

TORCH_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "ELU": jax.nn.elu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "Identity": lambda x: x,
    "LeakyReLU": jax.nn.leaky_relu,
    "LogSigmoid": jax.nn.log_sigmoid,
    "Mish": jax.nn.mish,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "SELU": jax.nn.selu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Tanh": jnp.tanh,
}
"""Activation modules of torch.nn, made without arguments, by the name of their class."""


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation behind it.

    Attributes:
        in_features: width of what it takes.
        out_features: width of what it gives.
        use_bias: whether it adds a bias.
        activation: a name of `TORCH_ACTIVATIONS`.
    """

    in_features: int
    out_features: int
    use_bias: bool
    activation: str

    def __str__(self) -> str:
        return f"dense {self.in_features} to {self.out_features}, {self.activation}"


@dataclass(frozen=True)
class Normalize:
    """Division by the vector's length."""

    def __str__(self) -> str:
        return "length 1"


@dataclass(frozen=True)
class EmbeddingConfig:
    """How hidden states become one vector.

    Attributes:
        modes: names of `MODES`; the vectors of several are concatenated in this order.
        include_prompt: whether the tokens of a prompt are pooled too.
        steps: what is done to the pooled vector, in order.
    """

    modes: tuple[str, ...]
    include_prompt: bool = True
    steps: tuple[Dense | Normalize, ...] = ()

    def __post_init__(self) -> None:
        if not self.modes or any(mode not in MODES for mode in self.modes):
            raise ValueError(f"pooling modes are {list(self.modes)}, expected some of: {', '.join(MODES)}")

    def size(self, hidden_size: int) -> int:
        """The width of the vector; ValueError if a dense layer does not take what comes before it."""
        size = hidden_size * len(self.modes)
        for step in self.steps:
            if isinstance(step, Dense):
                if step.in_features != size:
                    raise ValueError(f"a dense layer has in_features {step.in_features}, but is given {size} numbers")
                size = step.out_features
        return size

    def describe(self) -> tuple[str, ...]:
        """Each step in words."""
        without = "" if self.include_prompt else ", without the prompt"
        return f"pooling by {' and '.join(self.modes)}{without}", *map(str, self.steps)


class SentenceEmbedding(nnx.Module):
    """Pooling and what follows it.

    Attributes:
        config: what is done.
        dense: the layers of its `Dense` steps, in order.
    """

    def __init__(self, config: EmbeddingConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.config = config
        self.dense = nnx.List(
            Linear(step.in_features, step.out_features, use_bias=step.use_bias, rngs=rngs, param_dtype=param_dtype)
            for step in config.steps
            if isinstance(step, Dense)
        )

    def __call__(
        self,
        hidden: Float[Array, "batch tokens hidden_size"],
        lengths: Int[Array, " batch"],
        prompt_lengths: Int[Array, " batch"] | None = None,
    ) -> Float32[Array, "batch features"]:
        """The vector of each row's first `lengths` tokens, computed in float32; finite for a row without tokens.

        The first `prompt_lengths` of them are left out where the config asks for that.
        """
        begins = jnp.zeros_like(lengths) if prompt_lengths is None or self.config.include_prompt else prompt_lengths
        vector = pool(hidden, begins, lengths, self.config.modes)
        layers = iter(self.dense)
        for step in self.config.steps:
            if isinstance(step, Dense):
                vector = TORCH_ACTIVATIONS[step.activation](next(layers).in_float32(vector.astype(hidden.dtype)))
            else:
                # Zeros stay zeros, as in torch's normalize.
                vector = vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)
        return vector


def pool(
    hidden: Float[Array, "batch tokens hidden_size"],
    begins: Int[Array, " batch"],
    ends: Int[Array, " batch"],
    modes: tuple[str, ...],
) -> Float32[Array, "batch features"]:
    """The tokens `begins` to `ends` of each row pooled in each mode, and the results concatenated."""
    position = jnp.arange(hidden.shape[1])
    inside = (position >= begins[:, None]) & (position < ends[:, None])
    hidden = hidden.astype(jnp.float32)
    return jnp.concatenate([_POOL[mode](hidden, inside) for mode in modes], axis=-1)


_Hidden = Float32[Array, "batch tokens hidden_size"]
_Inside = Bool[Array, "batch tokens"]
_Pooled = Float32[Array, "batch hidden_size"]


def _weighted(hidden: _Hidden, weights: Float32[Array, "batch tokens"], divisor: Float32[Array, " batch"]) -> _Pooled:
    # What is outside has weight 0, which would not hide an infinite value.
    masked = jnp.where(weights[..., None] > 0, hidden, 0.0)
    return jnp.sum(masked * weights[..., None], axis=1) / divisor[:, None]


def _sum(hidden: _Hidden, inside: _Inside, root: float) -> _Pooled:
    """The sum divided by the number of tokens to the power of `root`."""
    weights = inside.astype(jnp.float32)
    return _weighted(hidden, weights, jnp.maximum(weights.sum(axis=1), 1.0) ** root)


def _weighted_mean(hidden: _Hidden, inside: _Inside) -> _Pooled:
    """Later tokens weigh more: a row's first 1, its second 2, whether or not those before are inside."""
    weights = jnp.where(inside, jnp.arange(1, inside.shape[1] + 1, dtype=jnp.float32), 0.0)
    return _weighted(hidden, weights, jnp.maximum(weights.sum(axis=1), 1.0))


def _first(hidden: _Hidden, inside: _Inside) -> _Pooled:
    """The first token inside; the row's first where none is."""
    return _at(hidden, jnp.argmax(inside, axis=1))


def _last(hidden: _Hidden, inside: _Inside) -> _Pooled:
    """The last token inside; zeros where none is."""
    last = inside.shape[1] - 1 - jnp.argmax(inside[:, ::-1], axis=1)
    return jnp.where(inside.any(axis=1, keepdims=True), _at(hidden, last), 0.0)


def _at(hidden: _Hidden, index: Int[Array, " batch"]) -> _Pooled:
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def _max(hidden: _Hidden, inside: _Inside) -> _Pooled:
    return jnp.max(jnp.where(inside[..., None], hidden, jnp.finfo(jnp.float32).min), axis=1)


_POOL: dict[str, Callable[[_Hidden, _Inside], _Pooled]] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _max,
    "mean": lambda hidden, inside: _sum(hidden, inside, 1.0),
    "mean_sqrt_len_tokens": lambda hidden, inside: _sum(hidden, inside, 0.5),
    "weightedmean": _weighted_mean,
}
