"""Progress bars on stderr, for whatever takes longer than two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """Handle of one bar: `advance` it, and give it a `note` such as the current loss."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self._progress.update(self._task, advance=amount)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(label: str, total: float, done: float = 0) -> Iterator[Bar]:
    """A bar with elapsed and estimated remaining time; `done` is where a resumed job starts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")
        yield Bar(progress, task)
