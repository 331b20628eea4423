"""A run's metrics: one JSON object a line in `metrics.jsonl`, and TensorBoard's event files."""

import json
from pathlib import Path
from types import TracebackType

from wanjax.outputs import whole_file


class MetricsLog:
    """Appends to both. Lines after `step`, which a killed run may have left, are taken away, so
    that a resumed run's log reads like one that never stopped."""

    def __init__(self, run: Path, step: int):
        from tensorboardX import SummaryWriter  # slow to import, and needed only while training

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            with whole_file(self.path, replace=True) as partial:
                partial.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, and one point of every curve."""
        rounded = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # the last line of a killed run may be cut
