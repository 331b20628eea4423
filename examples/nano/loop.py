"""Training of the small networks that the project's own train.py does not train.

It logs, saves, stops at a signal and goes on where it stopped, as train.py does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from wanjax.checkpoint import Checkpoints
from wanjax.loop import Loop

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

    def step() -> dict[str, jax.Array]:
        nonlocal state, done
        state, metrics = step_of(state, done)
        done += 1
        return metrics

    def save(number: int, _: dict[str, float] | None) -> None:
        checkpoints.save(number, state, {})

    loop = Loop(label, steps, step, save, save_every=SAVE_EVERY, log_every=LOG_EVERY)
    if signal := loop.run(run, checkpoints):
        raise SystemExit(128 + signal)
    return state
