"""A bar on the terminal for what goes through all rows of a dataset."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class RowRate(ProgressColumn):
    """Rows done, and how many a second; nothing before the first."""

    def render(self, task: Task) -> Text:
        if not task.completed:
            return Text()
        speed = task.finished_speed or task.speed
        done = f"{int(task.completed):,}" + ("" if task.total is None else f"/{int(task.total):,}")
        return Text(f"{done} rows" + (f", {speed:,.0f}/s" if speed else ""))


@contextlib.contextmanager
def row_bar(title: str, total: int | None, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Call what it gives with each number of rows that are done. `total` None: nobody knows how many there are.

    Nothing is drawn where standard error is no terminal.
    """
    console = Console(stderr=True)
    known = () if total is None else (TaskProgressColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *known, RowRate())
    hidden = not (show and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda rows: progress.advance(task, rows)
