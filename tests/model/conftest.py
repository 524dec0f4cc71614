"""Models in XLA, compiled with few optimisations."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiles_fast() -> Iterator[None]:
    """Most of their time goes into compiling small functions: what XLA optimises is tested where artifacts are."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
