"""The texts of an evaluation as token ids."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.text_windows import Text
from ..deploy.tokenization import TextTokenizer
from ..host import strict_json
from ..host.text import decode


def read_ids(file: Path, tokenizer: TextTokenizer | None, vocab_size: int) -> Text:
    """A text as token ids: .npy and .json files hold ids, others are UTF-8 for the tokenizer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no text and no ids, or a text for a model without tokenizer.
    """
    data = file.read_bytes()
    if file.suffix == ".npy":
        ids: Any = np.load(file, allow_pickle=False)
    elif file.suffix == ".json":
        ids = np.asarray(strict_json.parse(data, str(file)))
    elif tokenizer is None:
        raise ValueError(f"the checkpoint has no tokenizer for {file}: give token ids as .npy or .json")
    else:
        ids = tokenizer.encode(decode(data, str(file)), add_special_tokens=False).ids
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise ValueError(f"{file} has shape {ids.shape} and dtype {ids.dtype}, expected a 1-D array of token ids")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{file} has ids {ids.min()}..{ids.max()}, expected ids from 0 to {vocab_size - 1}")
    return Text(file.name, hashlib.sha256(data).hexdigest(), ids.astype(np.int32))
