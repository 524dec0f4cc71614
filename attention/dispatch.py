"""The one place where attention is given to XLA or to a native kernel.

A strategy says in words why a kernel does not compute a call. Those who compile listen, so that an artifact can tell.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Array, Float

from ..kernels import IN_A_KERNEL
from .cache import State
from .keys import KeyView
from .methods import Constants
from .ops import check_logit_options
from .rows import Mask, Rows
from .strategy import Attended, Attention, Call

_listener: ContextVar[Counter[str] | None] = ContextVar("iceformer_dispatch", default=None)


def attend(
    attention: Attention,
    query: Float[Array, "rows query_heads queries head_dim"],
    keys: KeyView,
    rows: Rows,
    mask: Mask = Mask(),  # noqa: B008 - a tuple of plain values
    constants: Constants | None = None,
) -> Attended:
    """softmax(query . key) . value over the keys that each query sees, as far as the attention looks at them.

    Args:
        attention: the strategy. One that would leave nothing out here (a budget that covers every key, a sliding
            window) is computed as exact attention.
        query: queries after the rotary embedding; `query_heads` is a multiple of `kv_heads`.
        keys: keys, values and index.
        rows: which slot each row attends to, and where its queries and its end lie. Keys from `length` on are not
            seen; queries from there on give finite rows without meaning. Without `causal` and `window`, queries may
            belong to another sequence, and all of them count.
        mask: which keys a query sees, and how logits are made.
        constants: what the attention was calibrated to in this layer, if it needs that.

    Returns:
        The attention's output in the query's dtype; 0 for a query that sees no key, and for idle rows.

    Raises:
        ValueError: a mask with a number that makes no sense, or options that do not go together.
    """
    return attend_and_keep(attention, Call(query, keys, rows, mask, constants or {}))[0]


def attend_and_keep(attention: Attention, call: Call) -> tuple[Attended, State]:
    """The same, and what the attention keeps of each slot for the next call."""
    _check(call.mask)
    attention = attention.within(call.keys.capacity, call.mask)
    objection = attention.objection(call)
    if (counter := _listener.get()) is not None:
        counter[f"{attention.kind}, " + (IN_A_KERNEL if objection is None else f"in XLA: {objection}")] += 1
    call = call._replace(state=attention.renewed(call, in_kernel=objection is None))
    if objection is None:
        return attention.attend_in_kernel(call), call.state
    return attention.attend(call._replace(rows=call.rows.settled())), call.state


@contextmanager
def listening() -> Iterator[Counter[str]]:
    """Counts the calls of attention that are traced inside, by what computes them and why; who listens outside does not
    hear of them."""
    counter: Counter[str] = Counter()
    token = _listener.set(counter)
    try:
        yield counter
    finally:
        _listener.reset(token)


def heard(calls: Counter[str]) -> None:
    """Tells those who listen of calls that were traced before, and now count again."""
    if (counter := _listener.get()) is not None:
        counter.update(calls)


def _check(mask: Mask) -> None:
    check_logit_options(mask.scale, mask.softcap)
    if mask.window is not None and not 1 <= mask.window < 2**31:
        raise ValueError(f"window is {mask.window}, expected 1 to 2**31 - 1 tokens, or None for no window")
    if mask.relative_bias is not None and mask.relative_bias.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias has {mask.relative_bias.shape[1]} distances, expected an odd number: from -reach to reach, "
            "with 0"
        )
