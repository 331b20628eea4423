"""The training loop: what it logs, saves, keeps and refuses, without a model."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from wanjax.checkpoint import (
    Checkpoints,
    _one_error,
    _step_of,
    kept_steps,
    split_choice,
    validations,
)
from wanjax.errors import UserError
from wanjax.loop import TFLOPS, Loop
from wanjax.metrics import read_metrics
from wanjax.outputs import LOCK, alone

VALIDATION = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}


TIMED = {"seconds", "tokens_per_second", TFLOPS}


def run(folder, steps=9, *, spoil=None, spoil_at=5, signal_at=None):
    """A loop over a sum, saving every third step and keeping one checkpoint, validating every
    second step."""
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, keep=1)
    done = checkpoints.latest or 0
    state = {"sum": jnp.float32(0)}
    if done:
        state, _ = checkpoints.restore(done, state)

    def step():
        nonlocal state, done
        done += 1
        if done == signal_at:
            signal.raise_signal(signal.SIGTERM)
        state = {"sum": state["sum"] + done}
        metrics = {"loss": jnp.float32(done), "gradient_norm": jnp.float32(1)}
        metrics |= {"tokens": 8, "flops": 3e12}
        return metrics | ({spoil: jnp.float32(math.nan)} if spoil and done == spoil_at else {})

    loop = Loop(
        "Summing", steps, step, lambda at, found: checkpoints.save(at, state, {}, found),
        save_every=3, validate=lambda: VALIDATION[done], validate_every=2
    )  # fmt: skip
    return loop.run(folder, checkpoints), float(state["sum"])


def test_the_best_by_validation_is_kept_beside_the_newest(tmp_path):
    assert run(tmp_path) == (None, 45)
    assert kept_steps(tmp_path) == [4, 9]
    assert _step_of(tmp_path, "best") == 4 and _step_of(tmp_path, "9") == 9
    lines = list(read_metrics(tmp_path))
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {s["step"]: s["validation_loss"] for s in lines if "validation_loss" in s} == VALIDATION
    assert all(line["tokens_per_second"] * line["seconds"] == pytest.approx(8) for line in lines)
    assert all(line[TFLOPS] * line["seconds"] == pytest.approx(3) for line in lines)


def test_stopped_and_resumed_equals_unbroken(tmp_path):
    assert run(tmp_path / "whole") == (None, 45)
    assert run(tmp_path / "cut", signal_at=5) == (signal.SIGTERM, 15)
    assert kept_steps(tmp_path / "cut") == [4, 5]
    assert run(tmp_path / "cut") == (None, 45)
    assert kept_steps(tmp_path / "cut") == kept_steps(tmp_path / "whole")
    same = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(folder)]
        for folder in (tmp_path / "cut", tmp_path / "whole")
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize("spoil", ["loss", "gradient_norm"])
def test_what_is_no_number_is_never_saved(spoil, tmp_path):
    with pytest.raises(
        UserError, match=f"{spoil.replace('_', ' ')} became nan at step 5 .step 4 is"
    ):
        run(tmp_path, spoil=spoil)
    assert kept_steps(tmp_path) == [4]
    with pytest.raises(UserError, match="became nan"):  # nor at the step that a signal ends
        run(tmp_path, spoil=spoil, signal_at=5)
    assert kept_steps(tmp_path) == [4]


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet"):
        _step_of(tmp_path, None)
    run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(UserError, match="no checkpoint with a validation loss.*4, 9"):
        _step_of(tmp_path, "best")
    for which in ("3", "last", "-9", "٣", "²"):
        with pytest.raises(UserError, match=f"no checkpoint '{which}'; choose from 4, 9, or best"):
            _step_of(tmp_path, which)


HOLD = """
import sys; from pathlib import Path; from wanjax.outputs import alone
with alone(Path(sys.argv[1]), "training"):
    print("in", flush=True); sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    held = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(held)]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    message = f"training in {held} \\(process {first.pid} on .*stop it first"
    with pytest.raises(UserError, match=message), alone(held, "training"):
        pytest.fail("two at once")
    first.kill()
    first.wait()
    with alone(held, "training"):
        assert (held / LOCK).exists()
    assert not held.exists()  # nothing was put into it
    with alone(held, "training"):
        (held / "run.json").write_text(json.dumps({}))
    assert held.exists()


def test_after_a_failed_save_errors_of_the_main_thread_are_shown():
    before = sys.excepthook
    with pytest.raises(ValueError), _one_error():
        raise ValueError
    assert sys.excepthook is before


def test_a_first_step_without_numbers_is_not_of_the_learning_rate(tmp_path):
    with pytest.raises(
        UserError, match=r"at step 1 \(no checkpoint is kept yet\); try --remat full"
    ):
        run(tmp_path, spoil="loss", spoil_at=1)
    assert kept_steps(tmp_path) == []
    assert not list(read_metrics(tmp_path))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_never_saved(bad, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = {"step": jnp.int32(1), "down": jnp.ones((2, 3)), "up": jnp.zeros((3, 2))}
    checkpoints.save(1, state, {})
    with pytest.raises(UserError, match="After step 2 .* NaN or infinite.*step 1 is kept"):
        checkpoints.save(2, state | {"up": jnp.zeros((3, 2)).at[1, 1].set(bad)}, {})
    assert kept_steps(tmp_path) == [1]


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(VALIDATION, 4, math.nan)
    with pytest.raises(UserError, match="validation loss became nan at step 4 .step 3 is kept"):
        run(tmp_path)
    assert kept_steps(tmp_path) == [2, 3]


def test_damaged_metrics_are_left_out(tmp_path):
    lines = [b'{"step": 1, "validation_loss": NaN}', b'{"step": 2, "validation_loss": 3.5}',
             b'{"step": "3", "loss": 1}', b'{"step": 4, "loss": null}', b"[1]", b"\xff",
             b'{"step": true}', b'{"loss": 1}', b'{"step": 6, "lo']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert validations(tmp_path, 9) == {2: 3.5}


def test_checkpoints_are_chosen_by_the_name_of_their_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a@best").mkdir()
    for text, chosen in {
        "runs/film": ("runs/film", None), "runs/film@best": ("runs/film", "best"),
        "a@best": ("a@best", None), "a@best@7": ("a@best", "7"), ".@best": (".", "best"),
        "w:2@9": ("w:2", "9"), "@best": ("@best", None),
    }.items():  # fmt: skip
        assert split_choice(Path(text)) == (Path(chosen[0]), chosen[1])
