"""Names in checkpoints of Qwen3: those of Llama, with norms of queries and keys."""

from . import llama

RULES = (*llama.RULES, llama.norms(r"self_attn\.[qk]_norm"))
