"""The examples' commands under Ctrl-C and SIGTERM: what runs may first save what it has."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAVES = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(0.6)  # longer than subprocess.run would wait
    (folder / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(60)
"""
RUNS = """
import sys
from examples.commands import run
from wanjax.errors import run_script
run_script(lambda: run(*sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_by_itself(tmp_path, number):
    """Ctrl-C reaches all processes of a terminal; SIGTERM the one that was named."""
    (tmp_path / "saves.py").write_text(SAVES)
    process = subprocess.Popen(
        [sys.executable, "-c", RUNS, str(tmp_path / "saves.py"), str(tmp_path)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    limit = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and process.returncode == 128 + number
