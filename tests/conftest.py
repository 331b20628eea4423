"""A tiny world on disk, for the tests of the scripts: made once a session, by the scripts
themselves, and read only."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

# First of all: before anything imports JAX.
from tests.environment import MEMORY, forget_old_programs, memory_held  # isort: skip

import jax

from tests.scripts import SIZE, call, compiled_quickly, write_world


def pytest_sessionstart() -> None:
    forget_old_programs()


@pytest.fixture(autouse=True, scope="module")
def room_for_the_next_file() -> Iterator[None]:
    """A worker that holds half of what it may lets its compiled programs go: they are on disk."""
    yield
    if memory_held() > MEMORY / 2:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def quickly() -> Iterator[None]:
    """For tests whose claim is no matter of optimisation: they compile in half the time."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ck` (a checkpoint), `clips` (two films with captions) and `picture.png`."""
    folder = tmp_path_factory.mktemp("world")
    with compiled_quickly():
        write_world(folder)
    return folder


@pytest.fixture(scope="session")
def features(world: Path) -> Path:
    """The clips, encoded by encode.py."""
    call("encode.py", "nano", "--data", "clips", "--checkpoint", "ck", "--out", "features", *SIZE,
        "--stride", 4, cwd=world)  # fmt: skip
    return world / "features"


@pytest.fixture(scope="session")
def trained(world: Path, features: Path) -> Path:
    """A run of four steps by train.py."""
    words = ("--features", "features", "--checkpoint", "ck", "--run", "run", "--batch", 2)
    call("train.py", "nano", *words, "--steps", 4, "--rank", 2, "--warmup", 3, cwd=world)
    return world / "run"
