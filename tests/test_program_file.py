"""`--aot FILE`: written once, found by whom it fits, refused by name by all others."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.scripts import SIZE, call, run
from tests.test_programs import PLAIN, entries
from wanjax import program_file
from wanjax.errors import UserError
from wanjax.program_file import ProgramFile, facts_of, programs_of
from wanjax.sharding import one_device
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

FACTS = {"jaxlib": "0.10.2", "devices": "1 cpu", "sizes": "9x32x48"}
PROGRAMS = {"jit_a-01": b"abc" * 100, "jit_b-02": b"d"}


class Under(dict):
    """A cache in memory."""

    def put(self, key: str, value: bytes) -> None:
        self[key] = value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "programs.aot"
    program_file._write(path, FACTS, PROGRAMS)
    return path


def test_what_is_written_is_read(file):
    assert program_file._read(file, FACTS) == PROGRAMS


@pytest.mark.parametrize("name", FACTS)
def test_what_does_not_fit_is_named(file, name):
    said = f"does not fit: it was made for {name} {FACTS[name]} \\(here another\\); everything is"
    with pytest.warns(UserWarning, match=said) as caught:
        assert program_file._read(file, FACTS | {name: "another"}) == {}
    assert len(caught) == 1


def hostile(path: Path, metadata: dict[str, str]) -> None:
    header = {"jit_a-01": (np.dtype(np.uint8), (3,))}
    with SafetensorsWriter(path, header, metadata) as writer:
        writer.write("jit_a-01", np.zeros(3, np.uint8))


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "random", "empty", "no file of ours", "no JSON", "a list"]
)
def test_what_is_damaged_is_none(file, damage):
    content = bytearray(file.read_bytes())
    ours = {"format": program_file.FORMAT}
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage in ("random", "empty"):
        file.write_bytes(np.random.default_rng(0).bytes(999) if damage == "random" else b"")
    elif damage == "no file of ours":
        hostile(file, {"format": "wanjax-prompt"})
    else:
        facts = "{" if damage == "no JSON" else "[]"
        hostile(file, ours | {"facts": facts, "digests": "{}"})
    before = file.read_bytes()
    with pytest.warns(UserWarning, match="everything is compiled anew, and the file is left"):
        assert program_file._read(file, FACTS) == {}
    assert file.read_bytes() == before


def test_the_file_comes_first_and_all_that_was_needed_is_remembered():
    under = Under(old=b"1")
    cache = ProgramFile({"known": b"0"}).over(under)
    assert cache.get("known") == b"0" and cache.get("old") == b"1" and cache.get("new") is None
    cache.put("new", b"2")
    assert cache.used == {"known": b"0", "old": b"1", "new": b"2"} and under["new"] == b"2"
    assert cache.missed == 2
    assert ProgramFile({}).over(None).get("x") is None


def test_the_facts_are_of_this_process():
    facts = facts_of(one_device())
    assert facts["devices"] == "1 cpu" and facts["mesh"] == "data=1,ring=1,ulysses=1"
    assert facts["jaxlib"] == program_file.jaxlib.__version__ and len(facts["CPU"]) == 8


def test_a_place_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"), programs_of(tmp_path / "file/a", FACTS):
        pass


def compute(power: int) -> float:
    """Compiled anew each time, as in a process of its own."""
    return float(jax.jit(lambda x: (x**power).sum())(np.arange(7.0)))


def test_what_a_file_lacks_is_said_and_the_file_is_left(tmp_path, recwarn):
    path = tmp_path / "a.aot"
    with programs_of(path, FACTS):
        found = compute(3)
    before = path.read_bytes()
    with programs_of(path, FACTS):
        assert compute(3) == found
    assert not recwarn.list
    said = "has 1 programs and lacks 1 .* left as it is"
    with pytest.warns(UserWarning, match=said), programs_of(path, FACTS):
        compute(4)
    assert path.read_bytes() == before


def test_a_run_that_fails_writes_no_half_of_a_file(tmp_path):
    with pytest.raises(ValueError), programs_of(tmp_path / "a.aot", FACTS):
        compute(5)
        raise ValueError
    assert not list(tmp_path.iterdir())


WORDS = ("sample.py", "nano", "--prompt", "rain", "--steps", 2, *SIZE, "--aot", "a.aot")


def of(world: Path) -> tuple:
    return (*WORDS, "--checkpoint", world / "ck", "--image", world / "picture.png")


@pytest.mark.compiles
def test_sample_writes_and_loads_its_programs(world, tmp_path):
    """Two processes, each with a user's cache of its own, which is empty: the second one compiles
    nothing, and so puts nothing there."""
    for name in ("a", "b"):
        cache = PLAIN | {"XDG_CACHE_HOME": str(tmp_path / name)}
        said = run(*of(world), "--out", f"{name}.mp4", cwd=tmp_path, environment=cache)
        assert "warning" not in said
    assert entries(tmp_path / "a") and not entries(tmp_path / "b")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.compiles
def test_a_file_of_another_size_is_refused_by_name_and_left(world, tmp_path):
    call(*of(world), "--out", "a.mp4", cwd=tmp_path)
    written = read_safetensors(tmp_path / "a.aot").metadata
    facts = json.loads(written["facts"])
    assert facts["sizes"] == "9x32x48" and facts["model"] == "i2v 48x2"
    (tmp_path / "a.aot").unlink()
    program_file._write(tmp_path / "a.aot", facts | {"sizes": "81x720x1280"}, PROGRAMS)
    before = (tmp_path / "a.aot").read_bytes()
    said = call(*of(world), "--out", "b.mp4", cwd=tmp_path)
    assert "warning: a.aot does not fit: it was made for sizes 81x720x1280 (here 9x32x48)" in said
    assert said.count("warning: ") == 1 and (tmp_path / "a.aot").read_bytes() == before
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
