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
    if code := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        sys.exit(code)


def say(text: str) -> None:
    """A line of its own, before what the next command prints."""
    print(f"\n{text}", flush=True)
