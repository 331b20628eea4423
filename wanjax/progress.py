"""Progress bars on stderr, for whatever takes longer than two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """Handle of one bar: `advance` it, and give it a `note` such as the current loss."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def advance(self, amount: float | int = 1, note: str | None = None) -> None:
        self._progress.update(self._task, advance=amount)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(
    label: str,
    total: float | int,
    done: float | int = 0,
    *,
    unit: Literal["steps", "bytes"] = "steps",
    hidden: bool = False,
) -> Iterator[Bar]:
    """A bar with elapsed and estimated remaining time; `done` is where a resumed job starts.

    `unit="bytes"` shows sizes and a rate; a `hidden` bar shows nothing.
    """
    count = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *count,
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")
        yield Bar(progress, task)
