"""One training loop for the small networks that the project's own train.py does not train.

It logs, saves, stops at a signal and goes on where it stopped: a step is a function of the state
and the step's number alone, so an interrupted run equals an unbroken one.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from wanjax.checkpoint import Checkpoints
from wanjax.metrics import MetricsLog
from wanjax.progress import progress_bar
from wanjax.training import stop_signals

SAVE_EVERY = 250
LOG_EVERY = 10


def train(
    label: str,
    run: Path,
    steps: int,
    state: Any,
    step_of: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]],
) -> Any:
    """`state` after `steps` calls `state, metrics = step_of(state, number)`, or after the newest
    checkpoint in `run` and the calls that are left. A signal saves and ends the process."""
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run, keep=2)
    done = checkpoints.latest or 0
    if done:
        state, _ = checkpoints.restore(done, state)
    with (
        MetricsLog(run, done) as log,
        progress_bar(label, steps, done) as bar,
        stop_signals() as signalled,
    ):
        begun, since = time.perf_counter(), done
        bar.advance(0, note="compiling the first step, which can take minutes")
        for number in range(done, steps):
            state, metrics = step_of(state, number)
            taken = number + 1
            if taken % LOG_EVERY == 0 or taken == steps:
                values = {name: float(value) for name, value in metrics.items()}
                seconds = (time.perf_counter() - begun) / (taken - since)
                begun, since = time.perf_counter(), taken
                log.write(taken, values | {"seconds": seconds})
                bar.advance(0, note=f"loss {values['loss']:.4f}")
            bar.advance()
            if taken % SAVE_EVERY == 0 or taken == steps or signalled():
                checkpoints.save(taken, state, {})
            if signal := signalled():
                raise SystemExit(128 + signal)
    return state
