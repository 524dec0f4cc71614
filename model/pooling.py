"""Pooling of sentence embedders: one vector of a row's hidden states, as sentence-transformers configures it.

Source: sentence-transformers' `modules.json` and the config of its Pooling module, whose vectors these equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

MODULES = "modules.json"
MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
"""As the newer form of a Pooling config names them."""
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""The older form: a switch for each mode."""
_WITHOUT = f"; without {MODULES} the model is taken as it is, with no sentence embedding"


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one vector.

    Attributes:
        mode: one of `MODES`.
        normalize: whether the vector is divided by its length.
    """

    mode: str
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"pooling mode is {self.mode!r}, expected one of: {', '.join(MODES)}")

    def __call__(
        self, hidden: Float[Array, "batch tokens hidden_size"], lengths: Int[Array, " batch"]
    ) -> Float32[Array, "batch hidden_size"]:
        """The vector of each row's first `lengths` tokens, computed in float32; finite for a row without tokens."""
        position = jnp.arange(hidden.shape[1])
        pooled = _POOL[self.mode](hidden.astype(jnp.float32), position < lengths[:, None])
        if not self.normalize:
            return pooled
        # Zeros stay zeros, as in torch's normalize.
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def read_pooling(modules: Any, read_config: Callable[[str], Mapping[str, Any]]) -> Pooling:
    """The pooling of a sentence embedder: a Transformer, a Pooling and perhaps a Normalize module.

    Args:
        modules: what modules.json holds.
        read_config: gives the config of the module in a folder.

    Raises:
        ValueError: other modules, or a pooling that is not built; by name.
    """
    if not isinstance(modules, list) or not all(isinstance(module, Mapping) for module in modules):
        raise ValueError(f"{MODULES} holds {str(modules)[:40]}, expected a list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{MODULES} has the modules {', '.join(kinds)}, supported are Transformer, Pooling and Normalize in this "
            f"order{_WITHOUT}"
        )
    folder = str(modules[1].get("path"))
    return Pooling(_read_mode(read_config(folder), f"{folder}/config.json"), normalize="Normalize" in kinds)


def _read_mode(config: Mapping[str, Any], where: str) -> str:
    if config.get("include_prompt", True) is not True:
        raise ValueError(f"{where}: include_prompt is false, supported is true (a prompt is pooled as well){_WITHOUT}")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in _SWITCHES.items() if config.get(switch)]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, Sequence) or len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{where}: the pooling is {modes}, supported is one of: {', '.join(MODES)}{_WITHOUT}")
    return modes[0]


_Hidden = Float32[Array, "batch tokens hidden_size"]
_Inside = Bool[Array, "batch tokens"]
_Pooled = Float32[Array, "batch hidden_size"]


def _weighted(hidden: _Hidden, weights: Float32[Array, "batch tokens"], divisor: Float32[Array, " batch"]) -> _Pooled:
    return jnp.sum(hidden * weights[..., None], axis=1) / divisor[:, None]


def _sum(hidden: _Hidden, inside: _Inside, root: float) -> _Pooled:
    """The sum divided by the number of tokens to the power of `root`."""
    weights = inside.astype(jnp.float32)
    return _weighted(hidden, weights, jnp.maximum(weights.sum(axis=1), 1.0) ** root)


def _weighted_mean(hidden: _Hidden, inside: _Inside) -> _Pooled:
    """Later tokens weigh more: the first 1, the second 2."""
    weights = jnp.where(inside, jnp.arange(1, inside.shape[1] + 1, dtype=jnp.float32), 0.0)
    return _weighted(hidden, weights, jnp.maximum(weights.sum(axis=1), 1.0))


def _last(hidden: _Hidden, inside: _Inside) -> _Pooled:
    last = jnp.maximum(inside.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def _max(hidden: _Hidden, inside: _Inside) -> _Pooled:
    return jnp.max(jnp.where(inside[..., None], hidden, jnp.finfo(jnp.float32).min), axis=1)


_POOL: dict[str, Callable[[_Hidden, _Inside], _Pooled]] = {
    "cls": lambda hidden, inside: hidden[:, 0],
    "lasttoken": _last,
    "max": _max,
    "mean": lambda hidden, inside: _sum(hidden, inside, 1.0),
    "mean_sqrt_len_tokens": lambda hidden, inside: _sum(hidden, inside, 0.5),
    "weightedmean": _weighted_mean,
}
