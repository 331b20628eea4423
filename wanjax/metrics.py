"""A run's metrics: one JSON object a line in `metrics.jsonl`, and TensorBoard's event files.

Both are written at once, in the training loop's own thread: TensorBoard's usual writer has a thread
behind a queue, which on a full disk dies and leaves the loop waiting for room in the queue.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from wanjax.errors import UserError
from wanjax.outputs import whole_file

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 10  # between what TensorBoard can see; lines of metrics.jsonl appear at once


class MetricsLog:
    """Appends to both. Lines after `step`, which a killed run may have left, are taken away, so
    that a resumed run's log reads like one that never stopped.

    Raises `UserError` where the disk takes no more.
    """

    def __init__(self, run: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = run / METRICS
        with self._explained():
            if self.path.exists():
                kept = [json.dumps(entry) for entry in read_metrics(run) if entry["step"] <= step]
                with whole_file(self.path, replace=True) as partial:
                    partial.write_text("".join(line + "\n" for line in kept))
            self._file = self.path.open("a", buffering=1)
            (run / "tensorboard").mkdir(exist_ok=True)
            self._board = EventsWriter(str(run / "tensorboard" / "events"))
            # What a killed run logged after `step` is not to be shown.
            start = SessionLog(status=SessionLog.START)
            now = time.time()
            self._board.write_event(Event(wall_time=now, step=step + 1, session_log=start))
        self._flushed = 0.0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, and one point of every curve."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        rounded = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        now = time.time()
        with self._explained():
            self._file.write(json.dumps({"step": step, **rounded}) + "\n")
            for name, value in metrics.items():
                event = Event(wall_time=now, step=step, summary=scalar(name, value))
                self._board.write_event(event)
            if now - self._flushed > FLUSH_SECONDS:
                self._board.flush()
                self._flushed = now

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            self._board.close()
        except OSError as full:
            if kind is None:
                raise self._full(full) from full

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"The metrics in {self.path.parent} could not be written ({error.strerror}); "
            "make room and run the same command again."
        )


def read_metrics(run: Path) -> Iterator[dict[str, float]]:
    """The lines of a run's metrics; what is damaged, as the last line of a killed run may be, is
    left out."""
    path = run / METRICS
    lines = path.read_text(errors="replace").split("\n") if path.exists() else ()
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and _is_line(entry):
                yield entry


def _is_line(entry: dict[str, Any]) -> bool:
    numbers = all(type(value) in (int, float) for value in entry.values())
    return numbers and type(entry.get("step")) is int
