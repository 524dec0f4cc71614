"""Lists of problems in error messages, which may have an entry for every tensor of a model."""

from collections.abc import Sequence

MAX_LINES = 20


def listed(lines: Sequence[str]) -> str:
    """The lines, each on a line of its own and indented; those beyond `MAX_LINES` are counted instead."""
    shown = list(lines[:MAX_LINES])
    if len(lines) > MAX_LINES:
        shown.append(f"... and {len(lines) - MAX_LINES} more")
    return "".join(f"\n  {line}" for line in shown)
