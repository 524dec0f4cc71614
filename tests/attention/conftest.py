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


@pytest.fixture(autouse=True, scope="module")
def _compiles_fast() -> Iterator[None]:
    """Most of their time goes into compiling small functions: what XLA optimises is tested where artifacts are."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
