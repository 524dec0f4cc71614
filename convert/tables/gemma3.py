"""Names in checkpoints of Gemma 3: those of Gemma 2, with norms of queries and keys.

In a model that sees images the language model is `language_model.model`, or later `model.language_model`; what is
there for the images is left out.
"""

from dataclasses import replace

from ..rules import Rule
from .gemma2 import RULES as GEMMA2
from .llama import norms

_LANGUAGE = r"(?:model\.(?=language_model\.))?(?:language_model\.)?"

RULES = (
    *(replace(rule, pattern=_LANGUAGE + rule.pattern) for rule in (*GEMMA2, norms(r"self_attn\.[qk]_norm"))),
    Rule(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*", None),
)
