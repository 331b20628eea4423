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

_shown = False  # whether a bar is on the screen


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

    `unit="bytes"` shows sizes and a rate; a `hidden` bar shows nothing, and neither does one that
    is opened while another is shown: the outer one tells more.
    """
    global _shown
    hidden = hidden or _shown
    count = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *count,
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    before, _shown = _shown, _shown or not hidden
    try:
        with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
            task = progress.add_task(label, total=total, completed=done, note="")
            yield Bar(progress, task)
    finally:
        _shown = before
