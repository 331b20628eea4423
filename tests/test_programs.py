"""Compiled programs on disk: found by who compiled them and by nobody else, never in the way."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.scripts import SIZE, ended, run, start
from wanjax import programs
from wanjax.programs import Programs
from wanjax.user_cache import user_cache

KEY = "jit_step-0123456789abcdef"
VALUE = bytes(range(256)) * 4
PLAIN = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}
# Compiles twice; says what came out, to the bit, and how often a program was found.
SMALL = """
import json, jax, jax.numpy as jnp
from wanjax.errors import run_script
from wanjax.programs import keep_programs
hits = []
def main():
    keep_programs()
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    x = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.arange(9.0).reshape(3, 3))
    y = jax.jit(lambda x: jnp.tanh(x).sum())(x)
    found = hits.count("/jax/compilation_cache/cache_hits")
    open("out.json", "w").write(json.dumps([x.tolist(), float(y), found]))
run_script(main)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "programs")


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.program"))


def test_what_was_put_is_found_by_its_key_alone(cache):
    assert cache.get(KEY) is None
    cache.put(KEY, VALUE)
    assert cache.get(KEY) == Programs(cache.folder).get(KEY) == VALUE
    assert cache.get(KEY + "0") is None
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("changed", ["jaxlib", "cpu", *programs.FLAGS])
def test_another_machine_version_or_flag_finds_nothing(cache, monkeypatch, changed):
    cache.put(KEY, VALUE)
    if changed == "jaxlib":
        monkeypatch.setattr(programs.jaxlib, "__version__", "9")
    elif changed == "cpu":
        monkeypatch.setattr(programs, "cpu", lambda: "model name: another")
    else:
        monkeypatch.setenv(changed, "--xla_another=true")
    assert Programs(cache.folder).get(KEY) is None


def test_the_features_of_this_cpu_are_known():
    assert "flags" in programs.machine() or "Features" in programs.machine()


@pytest.mark.parametrize("damage", ["cut", "random", "empty", "renamed"])
def test_a_damaged_or_foreign_entry_is_none_and_is_replaced(cache, damage):
    cache.put(KEY, VALUE)
    (path,) = entries(cache.folder)
    if damage == "renamed":
        cache.put("another", VALUE[::-1])
        next(p for p in entries(cache.folder) if p != path).rename(path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-7], "random": os.urandom(99)}.get(damage, b""))
    assert cache.get(KEY) is None
    cache.put(KEY, VALUE)
    assert cache.get(KEY) == VALUE


def test_it_is_bounded_and_what_was_not_used_goes_first(cache, monkeypatch):
    monkeypatch.setattr(programs, "LIMIT", 5 * (len(VALUE) + 32))
    for n in range(5):
        cache.put(f"{KEY}{n}", VALUE)
        os.utime(cache._file(f"{KEY}{n}"), (n, n))
    assert cache.get(f"{KEY}0") is not None  # which makes it the newest
    cache.put(KEY, VALUE)
    assert [n for n in range(5) if cache.get(f"{KEY}{n}")] == [0, 3, 4]
    assert sum(p.stat().st_size for p in entries(cache.folder)) <= programs.LIMIT


def test_what_others_may_write_is_neither_read_nor_written(cache):
    cache.put(KEY, VALUE)
    cache.folder.chmod(0o777)
    opened = Programs(cache.folder)
    assert opened.get(KEY) is None
    with pytest.warns(UserWarning, match="others may write into it.*JAX_COMPILATION_CACHE_DIR"):
        opened.put("another", VALUE)
    assert len(entries(cache.folder)) == 1


def test_a_folder_that_cannot_be_is_said_once(tmp_path, recwarn):
    (tmp_path / "file").write_text("")
    cache = Programs(tmp_path / "file" / "programs")
    for n in range(3):
        cache.put(f"{KEY}{n}", VALUE)
        assert cache.get(f"{KEY}{n}") is None
    assert len(recwarn) == 1 and "(Not a directory)" in str(recwarn[0].message)


def test_many_threads_at_once(cache, recwarn):
    """Each writes and reads all: nobody sees half of an entry."""

    def work(n: int) -> bytes | None:
        cache.put(f"{KEY}{n % 5}", VALUE * (n % 5 + 1))
        return cache.get(f"{KEY}{n % 5}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(50))) == [VALUE * (n % 5 + 1) for n in range(50)]
    assert not recwarn.list


def test_the_users_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("programs") == tmp_path / "wanjax" / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as the specification has it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache("programs") == tmp_path / ".cache" / "wanjax" / "programs"


def test_a_user_without_a_home_has_a_cache_of_their_own(monkeypatch):
    def homeless(_: type) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert user_cache("programs").is_absolute() and f"wanjax-{os.getuid()}" in str(user_cache("a"))


def ran(process: subprocess.Popen, cwd: Path) -> tuple[list, int, str]:
    """The results of SMALL, how many programs it found, and what it said."""
    said = ended(process, 0)
    *results, found = json.loads((cwd / "out.json").read_text())
    return results, found, said


def small(cwd: Path, largest_file: int | str = "unlimited", **environment: str | None):
    """Run SMALL to its end."""
    words = ("-c", SMALL)
    process = start(*words, cwd=cwd, environment=PLAIN | environment, largest_file=largest_file)
    return ran(process, cwd)


@pytest.mark.compiles
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    cache = tmp_path / "wanjax" / "programs"
    first, found, said = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    kept = entries(cache)
    assert (found, said) == (0, "") and len(kept) >= 2
    second = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert second == (first, len(kept), "") and entries(cache) == kept
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    kept[1].write_bytes(os.urandom(5000))
    third = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert third == (first, len(kept) - 2, "") and entries(cache) == kept
    flags = "--xla_cpu_enable_fast_min_max=true"
    other = small(tmp_path, XDG_CACHE_HOME=str(tmp_path), XLA_FLAGS=flags)
    assert other == (first, 0, "")


@pytest.mark.compiles
def test_two_processes_at_once(tmp_path):
    environment = PLAIN | {"XDG_CACHE_HOME": str(tmp_path)}
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    both = [start("-c", SMALL, cwd=folder, environment=environment) for folder in folders]
    one, other = map(ran, both, folders)
    assert one[0] == other[0] and one[2] == other[2] == ""
    third = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert third == (one[0], len(entries(tmp_path)), "") and third[1] >= 2


@pytest.mark.compiles
def test_a_program_that_jax_cannot_load_costs_a_line(tmp_path):
    """Sound by its hash, and yet nothing that this JAX can load."""
    first, *_ = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    largest = max(entries(tmp_path), key=lambda p: p.stat().st_size)
    largest.write_bytes(programs._digest(largest.name, VALUE) + VALUE)
    second, _, said = small(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert second == first and said.startswith("warning: ") and said.count("\n") == 1
    assert small(tmp_path, XDG_CACHE_HOME=str(tmp_path))[2] == ""


@pytest.mark.compiles
def test_no_home_no_room_and_the_users_own_folder(tmp_path):
    own, cache = tmp_path / "own", tmp_path / "cache"
    first, *_ = small(tmp_path, XDG_CACHE_HOME=None, HOME=None, TMPDIR=str(tmp_path))
    (tmp_path / "file").write_text("")
    closed, _, said = small(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert closed == first and said.count("\n") == 1 and "(Not a directory)" in said
    full, _, said = small(tmp_path, largest_file=1, XDG_CACHE_HOME=str(cache))
    assert full == first and said.count("\n") == 1 and "(File too large)" in said
    assert not [p for p in cache.rglob("*") if p.is_file()]
    named, _, said = small(
        tmp_path,
        XDG_CACHE_HOME=str(cache),
        JAX_COMPILATION_CACHE_DIR=str(own),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    assert named == first and said == "" and any(own.glob("*-cache"))
    assert not entries(cache)


@pytest.mark.compiles
def test_a_second_sample_compiles_nothing(world, tmp_path):
    """All of sample.py's programs have keys that the next process finds again; the video is the
    same to the bit. It takes two processes, of which the first compiles all."""
    words = ("sample.py", "nano", "--checkpoint", world / "ck", "--image", world / "picture.png")
    words += ("--prompt", "rain", "--steps", 2, *SIZE)
    environment = PLAIN | {"XDG_CACHE_HOME": str(tmp_path)}
    run(*words, "--out", "a.mp4", cwd=tmp_path, environment=environment)
    kept = {path: path.read_bytes() for path in entries(tmp_path)}
    run(*words, "--out", "b.mp4", cwd=tmp_path, environment=environment)
    assert kept == {path: path.read_bytes() for path in entries(tmp_path)} and len(kept) > 5
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
