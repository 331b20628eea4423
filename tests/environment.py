"""What has to stand before JAX and torch start, in the tests' processes and those that they start.

Compiled programs outlive the run and the checkout, in `~/.cache/wanjax-tests` or in the folder that
WANJAX_TESTS_CACHE names; it may be deleted at any time. No test reads or writes the user's own
cache. Each worker has its share of the cores, and a bound on its memory.
"""

import os
import resource
import signal
import tempfile
import time
from pathlib import Path

WEEK = 7 * 24 * 3600
MEMORY = 9 << 30  # bytes that a process may hold: 24 GiB hold two workers and what they start

# A worker inherits this from the process that started it, whose XDG_CACHE_HOME is changed below.
PROGRAMS = os.environ.setdefault(
    "WANJAX_TESTS_CACHE",
    str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wanjax-tests"),
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
CACHE = tempfile.TemporaryDirectory(prefix="wanjax-tests-", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = CACHE.name

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
THREADS = max(1, len(os.sched_getaffinity(0)) // WORKERS)
os.environ["OMP_NUM_THREADS"] = os.environ["NPROC"] = str(THREADS)  # torch's, XLA's
resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
# What is started in the background ignores Ctrl-C, and so would what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def memory_held() -> int:
    """Bytes of this process that count against the bound."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["VmData"].split()[0]) << 10


def forget_old_programs() -> None:
    """Remove the programs that no test has wanted for a week; changed code leaves many behind."""
    for program in Path(PROGRAMS).glob("*-cache"):
        seen = program.stat()
        if max(seen.st_atime, seen.st_mtime) < time.time() - WEEK:
            program.unlink(missing_ok=True)
