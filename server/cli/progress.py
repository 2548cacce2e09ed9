"""Shows how far a fetch is: a bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .console import console, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ...engines.sources import FetchProgress


@contextmanager
def fetch_bar() -> Iterator[Callable[["FetchProgress"], None]]:
    """Gives the callback to report to. One line for each step of a fetch; a step without a measure pulses."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield _line_writer()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeElapsedColumn(), console=err) as bars:
        current: tuple[str, TaskID] | None = None

        def report(progress: "FetchProgress") -> None:
            nonlocal current
            if current is None or current[0] != progress.message:
                if current is not None:
                    _complete(bars, current[1])
                current = progress.message, bars.add_task(progress.message, total=None)
            bars.update(current[1], total=progress.total_bytes, completed=progress.done_bytes or 0)

        yield report
        if current is not None:
            _complete(bars, current[1])


def _complete(bars: "Progress", task: "TaskID") -> None:
    """A finished step is full, whether it had a measure or not."""
    bars.update(task, total=1, completed=1)


def _line_writer() -> Callable[["FetchProgress"], None]:
    said = ""

    def report(progress: "FetchProgress") -> None:
        nonlocal said
        if progress.message != said:
            said = progress.message
            say(said + " ...")

    return report
