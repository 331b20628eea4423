"""The training loop: step, log, validate, save, and stop when asked to.

A step is a function of what the loop has done and of the step's number alone, and a checkpoint
holds all that it needs: so an interrupted run that goes on equals one that never stopped.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import jax

from wanjax.checkpoint import Checkpoints, validations
from wanjax.errors import UserError
from wanjax.metrics import MetricsLog
from wanjax.progress import COMPILING, Bar, progress_bar

Metrics = Mapping[str, jax.Array | float]
TFLOPS = "tflops_per_device"
"""The metric: the model's arithmetic by formula over the time of a step."""


@dataclass(frozen=True)
class Loop:
    """What is done in which step.

    `step()` takes one and returns its metrics, of which `loss` is one and `tokens` and `flops` (of
    one device), numbers of the host, may be; they are fetched while the device works at the next
    step. `save(step, metrics)` writes a checkpoint: every `save_every` steps, after the last, after
    the one at which a signal came, and whenever `validate()`, every `validate_every` steps, gives a
    loss below all before.
    """

    label: str
    steps: int
    step: Callable[[], Metrics]
    save: Callable[[int, dict[str, float] | None], None]
    save_every: int
    log_every: int = 1
    validate: Callable[[], float] | None = None
    validate_every: int = 0

    def run(self, run: Path, checkpoints: Checkpoints) -> int | None:
        """From the newest checkpoint, or the start, to the last step; the number of the signal that
        stopped it earlier, if one did. Raises `UserError` where what was learnt is no number."""
        done = checkpoints.latest or 0
        best = min(validations(run, done).values(), default=math.inf)
        with (
            MetricsLog(run, done) as log,
            progress_bar(self.label, self.steps, done) as bar,
            stop_signals() as stopped_by,
        ):
            report = _Report(self, log, bar, checkpoints)
            if done < self.steps:
                bar.advance(0, note=COMPILING)
            for number in range(done + 1, self.steps + 1):
                report.later(number, self.step())
                last = number == self.steps or stopped_by() is not None
                validates = self.validate_every and number % self.validate_every == 0
                if not (last or validates or number % self.save_every == 0):
                    continue
                found = {"validation_loss": self.validate()} if validates else None
                report.now(found)
                better = found is not None and found["validation_loss"] < best
                best = found["validation_loss"] if better else best
                if last or better or number % self.save_every == 0:
                    self.save(number, found)
                report.start()
                if last:
                    return stopped_by() if number < self.steps else None
        return None


class _Report:
    """Metrics of the latest step, fetched when the next one has been given to the device."""

    def __init__(self, loop: Loop, log: MetricsLog, bar: Bar, checkpoints: Checkpoints):
        self._loop, self._log, self._bar, self._checkpoints = loop, log, bar, checkpoints
        self._waiting: tuple[int, Metrics] | None = None
        self.start()

    def start(self) -> None:
        """What was done until now is of no step's time."""
        self._since = time.perf_counter()

    def later(self, step: int, metrics: Metrics) -> None:
        self.now()
        self._waiting = step, metrics

    def now(self, found: dict[str, float] | None = None) -> None:
        """Wait for the latest step, and show and log it."""
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        seconds = time.perf_counter() - self._since
        self.start()
        self._check(step, values | (found or {}))
        values["seconds"] = seconds
        note = f"loss {values['loss']:.4f}  {seconds:.2f} s/step"
        if "tokens" in values:
            values["tokens_per_second"] = values.pop("tokens") / seconds
            note += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if "flops" in values:
            values[TFLOPS] = values.pop("flops") / seconds / 1e12
            note += f"  {values[TFLOPS]:.3g} TFLOP/s"
        if step % self._loop.log_every == 0 or step == self._loop.steps or found:
            self._log.write(step, values | (found or {}))
        self._bar.advance(note=note)

    def _check(self, step: int, values: dict[str, float]) -> None:
        """Stop before a broken state is saved over good ones."""
        for name, value in values.items():
            if math.isfinite(value):
                continue
            kept = self._checkpoints.latest
            kept = "no checkpoint is kept yet" if kept is None else f"step {kept} is kept"
            # In the first step nothing has been learnt that could be wrong.
            learnt = "start a new run with a lower --learning-rate"
            remedy = "try --remat full and --dtype float32" if step == 1 else learnt
            raise UserError(
                f"The {name.replace('_', ' ')} became {value} at step {step} ({kept}); {remedy}."
            )


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """While this is open the first SIGINT or SIGTERM is remembered, not obeyed, so that a step can
    end and be saved; the value tells which came. A second one is obeyed at once."""
    received: list[int] = []
    with ExitStack() as undo:
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def remember(number: int, frame: FrameType | None) -> None:
            received.append(number)
            for n, handler in before.items():
                signal.signal(n, handler)

        for number, handler in before.items():
            signal.signal(number, remember)
            undo.callback(signal.signal, number, handler)
        yield lambda: received[0] if received else None
