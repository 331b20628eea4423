"""Processes of their own, for claims about memory and about several devices."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.scripts import ENVIRONMENT, ROOT


def peak_memory(*words: object) -> int:
    """The most anonymous memory, in bytes, that `python WORDS` is seen to hold (Linux)."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


def on_eight_devices(code: str, *words: object) -> Any:
    """What `code`, with WORDS in `sys.argv`, prints as JSON on eight virtual devices."""
    # Devices that gather several arrays at once may each hold a thread; XLA's eight are then all
    # waiting, and it gives up after 40 s.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "64"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | ENVIRONMENT | flags,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
