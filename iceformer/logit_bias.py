"""`--logit-bias TOKEN:VALUE`: the token ids that are meant, and what is added to their logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .deploy.session import Session

_OPTION = "--logit-bias"


def read_logit_bias(session: "Session", given: Sequence[str]) -> dict[int, float]:
    """What `session.generate` takes as logit_bias.

    Args:
        session: of the model whose tokens are meant.
        given: TOKEN:VALUE each. TOKEN is a token id if it is a number, else a text that is one token; the last colon
            ends it.

    Raises:
        ValueError: no colon, a value that is no finite number, a text that is not one token, an id that the model does
            not have, a token that is given twice.
    """
    from .deploy.sampling import Sampling

    biases: dict[int, float] = {}
    for text in given:
        token, colon, value = text.rpartition(":")
        if not colon or not token:
            raise ValueError(f"{_OPTION} is {text!r}, expected TOKEN:VALUE, such as 42:-5 or ' the':2")
        id = int(token) if token.isascii() and token.isdigit() else _id_of(session, token)
        if id in biases:
            raise ValueError(f"{_OPTION} has token {id} twice ({token!r} the second time), expected one value for it")
        biases[id] = _number(value, text)
    Sampling(logit_bias=biases).check_vocabulary(session.info.model.vocab_size or 0)
    return biases


def _id_of(session: "Session", text: str) -> int:
    if not session.has_tokenizer:
        raise ValueError(f"{_OPTION} has {text!r}, but this model has no tokenizer: expected a token id")
    ids = session.tokenize(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"{_OPTION} has {text!r}, which is {len(ids)} tokens ({', '.join(map(str, ids))}), expected one: give the "
            "token's id, or its text with the blank before it if it has one"
        )
    return int(ids[0])


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{_OPTION} is {text!r}, expected a number behind the last colon") from None
