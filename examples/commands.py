"""Run the project's own commands from an example, shown as a user would type them."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> None:
    """Run `python WORDS...` in the project's folder, showing it; its failure ends the process."""
    command = [str(word) for word in words]
    say("$ python " + shlex.join(command))
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        if code := _exit_code(process):
            sys.exit(code)


def _exit_code(process: subprocess.Popen) -> int:
    """Wait for it to end by itself, which may mean to save first: Ctrl-C reaches it from the
    terminal, and SIGTERM, which `run_script` turns into SystemExit, is passed on."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
        except SystemExit:
            process.terminate()


def say(text: str) -> None:
    """A line of its own, before what the next command prints."""
    print(f"\n{text}", flush=True)
