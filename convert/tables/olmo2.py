"""Names in checkpoints of OLMo 2: those of Llama, with other norms."""

from .llama import RULES as LLAMA
from .llama import norms

RULES = (*LLAMA, norms(r"post_feedforward_layernorm|self_attn\.[qk]_norm"))
