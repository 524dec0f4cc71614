"""The queries, keys and values of a model's layers over a prompt, as its attention takes them.

A strategy that writes down what it is called with and attends exactly stands in for the model's attention, so that no
model knows of it. Of the queries only some blocks are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from ..attention import Attention, Call, Exact, Mask, Plan, Rows, attend
from ..attention.strategy import Attended
from ..model.decoder import CausalLM

_BYTES = 1 << 30
"""What the layers that are recorded in one pass may take."""


@dataclass(frozen=True, eq=False)
class RecordedLayer:
    """What attention was given in one layer.

    Attributes:
        layer: its number, from 0.
        query: blocks of consecutive queries, after the rotary embedding.
        key, value: of all tokens.
        mask: how logits are made.
    """

    layer: int
    query: Float[Array, "blocks query_heads queries head_dim"]
    key: Float[Array, "1 kv_heads tokens head_dim"]
    value: Float[Array, "1 kv_heads tokens value_dim"]
    mask: Mask


@dataclass(frozen=True)
class Recording(Attention):
    """Exact attention that passes each call on, while it is traced.

    Attributes:
        record: is given the number of a layer and its call.
        layer: the number.
    """

    kind: ClassVar[str] = "recording"
    pure: ClassVar[bool] = False

    record: Callable[[int, Call], None]
    layer: int = 0

    def of_layer(self, layer: int) -> Attention:
        return replace(self, layer=layer)

    def within(self, capacity: int, mask: Mask) -> Attention:
        return Exact() if mask.window is not None else self

    def attend(self, call: Call) -> Attended:
        self.record(self.layer, call)
        return attend(Exact(), call.query, call.keys, call.rows, call.mask)


def record_layers(
    model: CausalLM, ids: Int32[np.ndarray, " tokens"], starts: Sequence[int], size: int, layers: Sequence[int]
) -> Iterator[RecordedLayer]:
    """The layers of some numbers, as many in one pass through the model as memory is set aside for.

    Args:
        model: the model, which attends exactly.
        ids: the prompt.
        starts: first position of each block of queries.
        size: queries of a block.
        layers: numbers of layers that see the whole sequence, rising.
    """
    config = model.config
    heads = len(starts) * size * config.num_attention_heads + 2 * ids.size * config.num_key_value_heads
    together = max(1, _BYTES // (heads * config.head_dim * 4))
    for first in range(0, len(layers), together):
        yield from _record(model, ids, np.asarray(starts), size, layers[first : first + together])


def _record(
    model: CausalLM, ids: np.ndarray, starts: np.ndarray, size: int, layers: Sequence[int]
) -> Iterator[RecordedLayer]:
    graph, state = nnx.split(model)
    masks: dict[int, Mask] = {}

    @jax.jit
    def run(state: Any, ids: Array) -> list[tuple[Array, Array, Array]]:
        found: list[tuple[Array, Array, Array]] = []

        def record(layer: int, call: Call) -> None:
            if layer in layers:
                query = jnp.concatenate([call.query[:, :, start : start + size] for start in starts])
                found.append((query, call.keys.key, call.keys.value))
                masks[layer] = call.mask

        rows = Rows.whole(jnp.array([ids.shape[0]], jnp.int32))
        nnx.merge(graph, state).hidden_states(ids[None], rows, plan=Plan(Recording(record)))
        return found

    arrays = run(state, ids)
    for layer in layers:
        query, key, value = arrays.pop(0)  # so that a layer's memory is free once it is measured
        yield RecordedLayer(layer, query, key, value, masks[layer])
