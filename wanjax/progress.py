"""Progress on stderr, for whatever takes longer than two seconds.

On a terminal that is a bar, or a clock where nothing can be counted. Elsewhere, in a log, it is a
line now and then: about as many as a reader wants, whether the work takes a minute or a week.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Literal, Protocol, runtime_checkable

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

COMPILING = "compiling the first step, which can take minutes"
Unit = Literal["steps", "bytes"]
WORTH_SAYING = 2.0  # seconds
LINES = 10.0, 600.0  # seconds between two lines of a log, at first and at most
_shown = False  # whether there is progress on the screen already


@runtime_checkable
class Bar(Protocol):
    """Handle of progress: `advance` it, and give it a `note` such as the current loss."""

    def advance(self, amount: float | int = 1, note: str | None = None) -> None: ...


class _Nothing:
    def advance(self, amount: float | int = 1, note: str | None = None) -> None:
        pass


class _Drawn:
    """A bar on a terminal."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def advance(self, amount: float | int = 1, note: str | None = None) -> None:
        self._progress.update(self._task, advance=amount)
        if note is not None:
            self._progress.update(self._task, note=note)


class _Lines:
    """Lines in a log: the first after some seconds, then ever more rarely, and one at the end of
    what took its time. A note without any progress, such as that something is compiled, is a line
    at once."""

    def __init__(self, label: str, total: float | int, done: float | int, unit: Unit):
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._note, self._began, self._resumed = "", time.monotonic(), done
        self._said, self._pause = self._began, LINES[0]
        self._silent, self._pending = True, False  # no line yet; nothing since the last one

    def advance(self, amount: float | int = 1, note: str | None = None) -> None:
        self._done += amount
        self._pending = True
        self._note = self._note if note is None else note
        if not amount and note:
            self.say()
        elif time.monotonic() - self._said >= self._pause:
            self._pause = min(2 * self._pause, LINES[1])
            self.say()

    def end(self) -> None:
        """The last line, unless it would say nothing new, or all took but a moment."""
        short = self._silent and time.monotonic() - self._began < WORTH_SAYING
        if not short and (self._silent or self._pending):
            self.say()

    def say(self) -> None:
        """One line."""
        self._said, self._silent, self._pending = time.monotonic(), False, False
        passed, new = self._said - self._began, self._done - self._resumed
        show = decimal if self._unit == "bytes" else lambda number: f"{number:.0f}"
        text = f"{self._label}: {show(self._done)} of {show(self._total)}, {clock(passed)}"
        if new > 0 and self._done < self._total:
            text += f", {clock((self._total - self._done) * passed / new)} left"
        sys.stderr.write(f"{text}{self._note and '; '}{self._note}\n")
        sys.stderr.flush()


@contextmanager
def progress_bar(
    label: str,
    total: float | int,
    done: float | int = 0,
    *,
    unit: Unit = "steps",
    hidden: bool = False,
) -> Iterator[Bar]:
    """Progress with elapsed and estimated remaining time; `done` is where a resumed job starts.

    `unit="bytes"` shows sizes and a rate; a `hidden` one shows nothing, and neither does one that
    is opened while another is shown: the outer one tells more.
    """
    with _alone(hidden) as shown:
        console = Console(stderr=True)
        if not shown:
            yield _Nothing()
        elif console.is_terminal:
            with Progress(*_columns(unit, total), console=console) as progress:
                task = progress.add_task(label, total=total, completed=done, note="")
                yield _Drawn(progress, task)
        else:
            lines = _Lines(label, total, done, unit)
            yield lines
            lines.end()


@contextmanager
def phase(label: str) -> Iterator[None]:
    """A name and a clock for work in which nothing can be counted."""
    with _alone(False) as shown:
        console = Console(stderr=True)
        if not shown:
            yield
        elif console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=console, transient=True) as progress:
                progress.add_task(label, total=None)
                yield
        else:
            with _clock_lines(label):
                yield


@contextmanager
def _clock_lines(label: str) -> Iterator[None]:
    """Lines in a log, if it lasts: that it has begun, that it goes on, and how long it took."""
    began, ended = time.monotonic(), Event()

    def say() -> None:
        pause = WORTH_SAYING
        while not ended.wait(pause):
            pause = min(max(LINES[0], 2 * pause), LINES[1])
            sys.stderr.write(f"{label}: {clock(time.monotonic() - began)}\n")
            sys.stderr.flush()

    teller = Thread(target=say, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
    if (passed := time.monotonic() - began) >= WORTH_SAYING:
        sys.stderr.write(f"{label}: took {clock(passed)}\n")


@contextmanager
def _alone(hidden: bool) -> Iterator[bool]:
    """Whether to show anything: not inside of what is shown already."""
    global _shown
    before, shown = _shown, not (hidden or _shown)
    _shown = before or shown
    try:
        yield shown
    finally:
        _shown = before


def _columns(unit: Unit, total: float) -> tuple[ProgressColumn, ...]:
    """On a narrow terminal the note gives way, and never the count and the times."""

    def whole(width: int) -> Column:
        return Column(no_wrap=True, min_width=width)

    counted = MofNCompleteColumn(table_column=whole(2 * len(f"{total:.0f}") + 1))
    return (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (counted,)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=whole(7)),
        TextColumn("left", table_column=whole(4)),
        TimeRemainingColumn(table_column=whole(7)),
    )


def clock(seconds: float | int) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
