"""Text from outside in messages: names of a checkpoint or an artifact may be long, many, or hold anything.

Characters that would control the terminal, or change the order in which a line is read, become escapes.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_LINES = 20
MAX_CHARACTERS = 500
MAX_LINE = 2000

# C0, DEL, C1, marks and overrides of direction, line and paragraph separators, halves of surrogate pairs (bytes of a
# path that are not text), the byte order mark, and invisible tags.
_CONTROLS = (
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_CONTROL = re.compile(_CONTROLS)
_CONTROL_IN_LINES = re.compile(rf"(?![\n\t]){_CONTROLS}")
# A list of problems in a message has its entries on lines of their own, indented by two blanks.
_CONTROL_IN_MESSAGE = re.compile(rf"(?!\n  ){_CONTROLS}")


def printable(text: str) -> str:
    """A name or a line with every control character as an escape, `\\n` among them."""
    return _CONTROL.sub(_escape, text)


def printable_message(text: str) -> str:
    """As `printable`, but the lines of a list of problems stay lines."""
    return _CONTROL_IN_MESSAGE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """As `printable`, but line feeds and tabs stay."""
    return _CONTROL_IN_LINES.sub(_escape, text)


def listed(lines: Sequence[str]) -> str:
    """The lines, each on a line of its own and indented; those beyond `MAX_LINES` are counted instead."""
    kept = [shown(line) for line in lines[:MAX_LINES]]
    if len(lines) > MAX_LINES:
        kept.append(f"... and {len(lines) - MAX_LINES} more")
    return "".join(f"\n  {line}" for line in kept)


def joined(names: Sequence[object]) -> str:
    """The names in one line; those beyond `MAX_LINES` are counted instead."""
    kept = [shown(name) for name in names[:MAX_LINES]]
    if len(names) > MAX_LINES:
        kept.append(f"and {len(names) - MAX_LINES} more")
    return ", ".join(kept)


def shown(text: object, most: int = MAX_CHARACTERS) -> str:
    """As `printable`, with the middle left out if it is long."""
    line = printable(str(text))
    return line if len(line) <= most else f"{line[: most - 100]} ... {line[-95:]}"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors whose lines are printable and of some length, whatever values of a folder's files they quote."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        plain = "\n".join(shown(line, MAX_LINE) for line in message.split("\n"))
        if plain == message:
            raise
        raise ValueError(plain) from error


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
