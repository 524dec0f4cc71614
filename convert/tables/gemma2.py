"""Names in checkpoints of Gemma 2: those of Llama, with more norms."""

from .llama import RULES as LLAMA
from .llama import norms

RULES = (*LLAMA, norms(r"(?:pre|post)_feedforward_layernorm"))
