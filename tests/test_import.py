"""`import iceformer` is light, and its public names are those that are documented."""

import subprocess
import sys

import pytest

import iceformer


def imported_by(statement: str) -> set[str]:
    """Top-level packages in a fresh process after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import iceformer", "import iceformer.cli"])
def test_heavy_packages_load_on_use(statement: str) -> None:
    assert not imported_by(statement) & {"jax", "numpy", "flax", "orbax", "torch", "transformers", "tokenizers"}


def test_loading_needs_no_compile_packages() -> None:
    packages = imported_by("import iceformer; iceformer.load")
    assert "jax" in packages
    assert not packages & {"flax", "orbax", "jaxtyping", "torch", "transformers"}


def test_public_names() -> None:
    assert iceformer.__all__ == [
        "Auto",
        "Configuration",
        "DecodeSelection",
        "Exact",
        "Plan",
        "TwoStage",
        "compile",
        "convert_checkpoint",
        "evaluate_checkpoint",
        "load",
        "load_model",
    ]
    assert all(callable(getattr(iceformer, name)) for name in iceformer.__all__)
    assert set(iceformer.__all__) <= set(dir(iceformer))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'iceformer' has no attribute 'lode'"):
        iceformer.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
