"""The steps of compiling, as a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..host.interrupts import check as check_interrupt


class Steps:
    """What is done, one step after another. Calling it begins a step.

    Attributes:
        total: steps in all.
        begun: those that have begun.
    """

    def __init__(self, total: int, show: Callable[..., Any]) -> None:
        """
        Args:
            total: steps in all, as far as is known.
            show: called with `description`, `completed` and `total` at each step.
        """
        self.total, self.begun, self._show = total, 0, show

    def __call__(self, description: str) -> None:
        """Begins a step, of which one line of text tells."""
        check_interrupt()
        self._show(description=description, completed=self.begun, total=self.total)
        self.begun += 1

    def drop(self, count: int) -> None:
        """Takes steps that turn out to be needless out of the total."""
        self.total -= count


@contextmanager
def progress_of(total: int, show: bool) -> Iterator[Steps]:
    """The steps, on a progress bar on stderr if `show` is true."""
    if not show:
        yield Steps(total, lambda **_: None)
        return

    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TimeElapsedColumn

    from ..host.terminal import Description, progress_bar

    columns = (Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_bar(SpinnerColumn(), *columns) as bar:
        task = bar.add_task("starting", total=total)
        steps = Steps(total, lambda **changes: bar.update(task, **changes))
        yield steps
        bar.update(task, description="compiled", completed=steps.total, total=steps.total)
