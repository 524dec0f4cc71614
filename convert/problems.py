"""What error messages say of a checkpoint, whose names may be long, many, or hold anything."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_LINES = 20
MAX_CHARACTERS = 500
MAX_LINE = 2000


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
    """Text from outside in one line: what a terminal would act on as escapes, and the middle left out if it is long."""
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))
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
