"""Every test of this folder runs twice: in pure XLA, and with the native kernels where they are built."""

from collections.abc import Iterator
from contextlib import nullcontext

import jax
import pytest

from iceformer import kernels


@pytest.fixture(autouse=True, scope="module", params=["xla", "kernels"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """The form that attention takes: "xla" or "kernels"."""
    if request.param == "kernels" and not kernels.register():
        pytest.skip("the native kernels are not built")
    jax.clear_caches()
    with nullcontext() if request.param == "kernels" else kernels.disabled():
        yield request.param
