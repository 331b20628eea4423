"""Run the project's own commands from an example, shown as a user would type them."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> None:
    """Run `python WORDS...` in the project's folder, showing it; its failure ends the process."""
    command = [str(word) for word in words]
    say(f"$ {python()} {shlex.join(command)}")
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        code = _exit_code(process)
    if code < 0:
        name = signal.Signals(-code).name
        say(f"{command[0]} was ended by {name}" + "; is there memory enough?" * (code == -9))
    if code:
        sys.exit(code if code > 0 else 128 - code)


def python() -> str:
    """This Python as one types it in the project's folder."""
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


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
