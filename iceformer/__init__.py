"""iceformer: long-context transformers on CPUs, with two-stage top-k attention compiled ahead of time.

The public API and nothing else. Every name is imported on first use, so `import iceformer` is light and a process that
only runs an artifact never imports what converting and compiling need.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention.decode_selection import DecodeSelection
    from .attention.exact import Exact
    from .attention.plan import Auto, Plan
    from .attention.two_stage import TwoStage
    from .convert.checkpoint import load_model
    from .convert.convert import convert_checkpoint
    from .deploy.compile import compile
    from .deploy.session import load
    from .evaluate.configuration import Configuration
    from .evaluate.evaluation import evaluate_checkpoint

__version__ = "0.1.0"
__all__ = [
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

_HOME = {
    "Auto": "attention.plan",
    "Configuration": "evaluate.configuration",
    "DecodeSelection": "attention.decode_selection",
    "Exact": "attention.exact",
    "Plan": "attention.plan",
    "TwoStage": "attention.two_stage",
    "compile": "deploy.compile",
    "convert_checkpoint": "convert.convert",
    "evaluate_checkpoint": "evaluate.evaluation",
    "load": "deploy.session",
    "load_model": "convert.checkpoint",
}
# What the `convert` extra brings, which running an artifact does not need.
_CONVERT_PACKAGES = {"flax", "jaxtyping", "orbax"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _CONVERT_PACKAGES:
            raise
        message = f"iceformer.{name} needs {error.name}: pip install 'iceformer[convert]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
