"""All that is printed for people goes through here, so that no name from outside is read as markup or as a command.

Rich's markup, emoji and highlighting are off: styles are given beside the text, never in it. Characters that would
control the terminal are shown as escapes (see `messages`).
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.segment import Segment
from rich.text import Text

from .messages import printable, printable_lines


class Terminal(Console):
    """A console that prints strings as they are, in tables too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self._line_is_open = False

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A string as text of that many printable characters."""
        return super().render_str(printable_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever it is, and whoever made its text."""
        for segment in super().render(renderable, options):
            clean = segment.text if segment.control else printable_lines(segment.text)
            if clean and not segment.control:
                self._line_is_open = not clean.endswith("\n")
            yield segment if clean is segment.text else Segment(clean, segment.style)

    def end_line(self) -> None:
        """Begins a new line where something, such as a progress bar that was interrupted, left one open."""
        if self._line_is_open and not self.is_terminal:
            self.line()
            self._line_is_open = False


stdout, stderr = Terminal(), Terminal(stderr=True)


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """A progress bar on stderr, whose first columns are given and whose tasks have their description after them."""
    return Progress(*columns, console=stderr, **options)


class Description(ProgressColumn):
    """The column of a task's description."""

    def render(self, task: Task) -> Text:
        """As it is."""
        return Text(printable(task.description))
