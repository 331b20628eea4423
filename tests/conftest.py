"""What all tests share: no test reads or writes the user's own cache, and a tiny world on disk.

The fixtures of the scripts' tests are made once a session, by the scripts themselves as processes.
"""

import os
import tempfile
from pathlib import Path

import pytest

from tests.scripts import SIZE, run, write_world

CACHE = tempfile.TemporaryDirectory(prefix="wanjax-tests-", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ck` (a checkpoint), `clips` (two films with captions) and `picture.png`."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="session")
def features(world: Path) -> Path:
    """The clips, encoded by encode.py."""
    run("encode.py", "nano", "--data", "clips", "--checkpoint", "ck", "--out", "features", *SIZE,
        "--stride", 4, cwd=world)  # fmt: skip
    return world / "features"


@pytest.fixture(scope="session")
def trained(world: Path, features: Path) -> Path:
    """A run of four steps by train.py."""
    words = ("--features", "features", "--checkpoint", "ck", "--run", "run", "--batch", 2)
    run("train.py", "nano", *words, "--steps", 4, "--rank", 2, cwd=world)
    return world / "run"
