"""From messages or texts to the token ids that the engine reads, and what becomes of those that do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.inputs import check_ids
from ..deploy.session import Session
from .errors import ApiError, refused, too_long
from .settings import Overflow

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that fits.

    Attributes:
        ids: int32 [n].
        dropped_tokens: how many tokens were left out.
        dropped_messages: how many messages were left out; 0 for a prompt that is no conversation.
    """

    ids: NDArray[np.int32]
    dropped_tokens: int = 0
    dropped_messages: int = 0


@dataclass(frozen=True)
class Room:
    """What a prompt must fit into.

    Attributes:
        context: tokens of the largest bucket.
        wanted: new tokens that must have room; at least 1.
        overflow: what is done where they have none.
    """

    context: int
    wanted: int
    overflow: Overflow

    def holds(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room for the new ones."""
        return tokens + self.wanted <= self.context


def chat_text(session: Session, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None) -> str:
    """The prompt of a conversation, as the model's chat template has it.

    Raises:
        ApiError: 400: no messages as a template takes them, or no template.
    """
    variables = dict(variables or {})
    reserved = {"messages", "tools", "documents", "self"} & variables.keys()
    if reserved:
        raise ApiError(400, f"chat_template_kwargs has {min(reserved)}, which is no variable of its own: leave it out")
    plain = [_plain(message, f"messages.{index}") for index, message in enumerate(messages)]
    with refused("messages"):
        return session.chat_prompt(plain, **variables)


def chat_prompt(
    session: Session, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None, room: Room
) -> Prompt:
    """The prompt of a conversation; of one that is too long, the oldest messages are dropped, if that is wanted.

    The messages of the system at the beginning, and the last message, are always kept.

    Raises:
        ApiError: 400, as `chat_text`, and for a conversation that does not fit.
    """

    def ids_of(kept: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        with refused("messages"):
            return session.tokenize(chat_text(session, kept, variables), add_special_tokens=False)

    ids = ids_of(messages)
    if room.holds(len(ids)):
        return Prompt(_checked(ids, session, "messages"))
    if room.overflow == "error":
        raise too_long(room.context, len(ids), room.wanted, "messages")
    first = next((place for place, each in enumerate(messages) if each.get("role") not in _SYSTEM), len(messages))
    head, rest = messages[:first], messages[first:]
    # Conversations begin with a question: where there is none, a template may refuse them.
    starts = [place for place in range(1, len(rest)) if rest[place].get("role") == "user"]
    least = ids
    for start in starts:
        least = ids_of([*head, *rest[start:]])
        if room.holds(len(least)):
            return Prompt(_checked(least, session, "messages"), len(ids) - len(least), start)
    raise too_long(room.context, len(least), room.wanted, "messages")


def text_prompt(session: Session, given: str | list[int], special: bool | None, room: Room) -> Prompt:
    """The prompt of a text or of ids; of one that is too long, the oldest tokens are dropped, if that is wanted.

    A special token at the beginning is always kept.

    Raises:
        ApiError: 400 for ids that the model does not have, and a prompt that is empty or does not fit.
    """
    with refused("prompt"):
        ids = session.tokenize(given, add_special_tokens=special) if isinstance(given, str) else np.asarray(given)
    if room.holds(len(ids)):
        return Prompt(_checked(ids, session, "prompt"))
    kept = room.context - room.wanted
    if room.overflow == "error" or kept < 1:
        raise too_long(room.context, len(ids), room.wanted, "prompt")
    with refused("prompt"):
        head = int(kept > 1 and session.has_tokenizer and session.is_special(int(ids[0])))
    cut = np.concatenate([ids[:head], ids[len(ids) - kept + head :]])
    return Prompt(_checked(cut, session, "prompt"), len(ids) - kept)


def _checked(ids: NDArray[Any], session: Session, param: str) -> NDArray[np.int32]:
    with refused(param):
        return check_ids(ids, "the prompt", session.info)


def _plain(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message with its parts as one text, because few templates know of parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400,
                f"{place} has a part of type {str(kind)[:40]!r}, expected text: this model reads text",
                param="messages",
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
