"""All that is printed for people goes through here, so that no name from outside is read as markup or as a command.

Rich's markup, emoji and highlighting are off: styles are given beside the text, never in it. Characters that would
control the terminal, or change the order in which a line is read, are shown as escapes.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.segment import Segment
from rich.text import Text

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


class Terminal(Console):
    """A console that prints strings as they are, in tables too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A string as text of that many printable characters."""
        return super().render_str(printable_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever it is, and whoever made its text."""
        for segment in super().render(renderable, options):
            clean = segment.text if segment.control else printable_lines(segment.text)
            yield segment if clean is segment.text else Segment(clean, segment.style)


stdout, stderr = Terminal(), Terminal(stderr=True)


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """A progress bar on stderr, whose first columns are given and whose tasks have their description after them."""
    return Progress(*columns, console=stderr, **options)


class Description(ProgressColumn):
    """The column of a task's description."""

    def render(self, task: Task) -> Text:
        """As it is."""
        return Text(printable(task.description))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
