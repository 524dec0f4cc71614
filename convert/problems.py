"""What error messages say of a checkpoint, whose names may be long, many, or hold anything."""

from collections.abc import Sequence

MAX_LINES = 20
MAX_CHARACTERS = 500


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


def shown(text: object) -> str:
    """Text from outside in one line: what a terminal would act on as escapes, and the middle left out if it is long."""
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))
    if len(line) <= MAX_CHARACTERS:
        return line
    return f"{line[: MAX_CHARACTERS - 100]} ... {line[-95:]}"
