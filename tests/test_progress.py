"""Progress: one at a time; bars and clocks on a terminal, lines in a log."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from wanjax import progress
from wanjax.progress import clock, phase, progress_bar


@pytest.fixture
def all_is_worth_saying(monkeypatch):
    monkeypatch.setattr(progress, "WORTH_SAYING", 0)


@pytest.mark.usefixtures("all_is_worth_saying")
def test_a_bar_inside_another_is_not_shown(capsys):
    with progress_bar("outer", 2) as outer, progress_bar("inner", 2) as inner, phase("clock"):
        inner.advance(2)
        outer.advance()
    with pytest.raises(ValueError), progress_bar("failed", 1):
        raise ValueError
    with progress_bar("later", 1) as bar:
        bar.advance()
    said = capsys.readouterr().err
    assert "outer" in said and "inner" not in said and "later" in said


@pytest.mark.usefixtures("all_is_worth_saying")
def test_a_bar_inside_a_hidden_one_is_shown(capsys):
    with progress_bar("outer", 1, hidden=True), progress_bar("inner", 1) as bar:
        bar.advance()
    said = capsys.readouterr().err
    assert "inner" in said and "outer" not in said


def test_a_log_gets_lines_ever_more_rarely(capsys, monkeypatch):
    """A thousand steps of a second each, by a clock of the test's own."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("Training", 1100, done=100) as bar:
        bar.advance(0, note="compiling")
        for i in range(1000):
            now += 1
            bar.advance(note=f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training: 100 of 1100, 0:00; compiling"
    assert lines[1] == "Training: 110 of 1100, 0:10, 16:30 left; loss 9"
    assert lines[-1] == "Training: 1100 of 1100, 16:40; loss 999"
    assert 6 <= len(lines) <= 12
    with progress_bar("Loading", 3 << 30, unit="bytes") as bar:
        now += 9
        bar.advance(3 << 30)
    assert capsys.readouterr().err == "Loading: 3.2 GB of 3.2 GB, 0:09\n"
    with progress_bar("Encoding", 2) as bar:
        now += 11
        bar.advance(2)
    with progress_bar("a moment", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == "Encoding: 2 of 2, 0:11\n"  # once


def test_a_phase_tells_a_log_only_if_it_lasts(capsys, monkeypatch):
    with phase("short"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "WORTH_SAYING", 0.05)
    with pytest.raises(ValueError), phase("Decoding"):
        time.sleep(0.2)
        raise ValueError
    with phase("Decoding"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "Decoding: 0:00\nDecoding: 0:00\nDecoding: took 0:00\n"


def test_times():
    assert [clock(s) for s in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:01:01"
    ]  # fmt: skip


SHOW = """
import time
from wanjax.progress import phase, progress_bar
with progress_bar("Denoising", 2) as bar:
    bar.advance(2, note="loss [/0.5] of a[1]")
with phase("Decoding"):
    time.sleep(0.3)
"""


def test_a_terminal_gets_a_bar_and_a_clock():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", SHOW], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    said = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", os.read(ours, 1 << 16).decode())
    os.close(ours)
    assert re.search("Denoising.*━.*2/2", said) and "Decoding" in said
    assert "loss [/0.5] of a[1]" in said  # brackets of names are no markup
