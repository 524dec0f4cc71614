"""A label cache: the channels of queries and keys that carry most of the logits, the same for every token of a head.

Source: Double Sparsity (Yang et al., arXiv 2408.07092) finds offline the r channels i of each head with the largest
mean |q_i k_i| and keeps those of the keys in a contiguous cache of few bits, 16 bytes a token. Queries and keys of a
calibration text count as independent here, so that the mean is that of |q_i| times that of |k_i|. The channels are kept
in int8, as `low_rank` keeps its projections, of which this is the case that picks coordinates.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from .low_rank import LowRank


@dataclass(frozen=True)
class LabelCache(LowRank):
    """Scores the largest product of the `rank` heaviest channels of a query and of a key in each key block.

    Attributes:
        rank: channels that are kept, all of them where the model's head_dim is smaller.
        query_share: as `LowRank` has it.
    """

    name: ClassVar[str] = "label_cache"
    source: ClassVar[str] = "Double Sparsity, arXiv 2408.07092"

    rank: int = 16

    def projections(
        self,
        query: Float[np.ndarray, "query_heads tokens head_dim"],
        key: Float[np.ndarray, "kv_heads tokens head_dim"],
    ) -> tuple[Float[np.ndarray, "kv_heads head_dim rank"], Float[np.ndarray, "kv_heads head_dim rank"]]:
        """One column for each channel, with a 1 in its place."""
        kv_heads, _, head_dim = key.shape
        sizes = np.abs(query).mean(axis=1).reshape(kv_heads, -1, head_dim).mean(axis=1) * np.abs(key).mean(axis=1)
        channels = np.sort(np.argsort(-sizes, axis=1, kind="stable")[:, : self.rank], axis=1)
        picks = (np.arange(head_dim)[:, None] == channels[:, None]).astype(np.float32)
        return picks, picks
