"""`convert pipeline --delete-source`: at every moment all is in the source or in the result."""

import json
import os
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from convert import freeing
from convert.__main__ import main
from tests.checkpoints import official_folder, random_tensors
from tests.scripts import listing, run, start, stop_when
from wanjax import outputs
from wanjax.errors import UserError

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
WEIGHTS = 3 + 3  # three shards of the denoiser, and one file of each other network


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return official_folder(tmp_path_factory.mktemp("source") / "official")


@pytest.fixture(scope="module")
def native(official) -> Path:
    folder = official.parent / "native"
    main(["pipeline", str(official), str(folder), "--dtype", "bfloat16"])
    return folder


@pytest.fixture
def source(official, tmp_path) -> Path:
    return shutil.copytree(official, tmp_path / "official")


def words(source: Path, *more: str) -> list[str]:
    here = ["pipeline", str(source), str(source.parent / "native"), "--dtype", "bfloat16"]
    return [*here, "--delete-source", *more]


def weights(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".pth")]


def freed(folder: Path) -> list[Path]:
    """The stand-ins in an unfinished conversion."""
    return [p for p in folder.glob("freed/**/*") if p.suffix in (".safetensors", ".pth")]


def test_the_result_is_the_same_and_the_weights_are_gone(source, official, native, capsys):
    main(words(source))
    said = capsys.readouterr()
    assert "deleted" in said.out and "of which" in said.err and "free" in said.err
    assert listing(source.parent / "native") == listing(native)
    small = {p.relative_to(official) for p in official.rglob("*")}
    small -= {p.relative_to(official) for p in weights(official)}
    assert {p.relative_to(source) for p in source.rglob("*")} == small
    assert {p.name for p in source.parent.iterdir()} == {"official", "native"}


def test_the_room_is_there_while_the_conversion_goes_on(source, monkeypatch):
    """A file that is mapped keeps its room when it is deleted."""
    opened = {path.name: path.open("rb") for path in weights(source)}
    left: list[int] = []
    leave = freeing.Freeing._leave_stand_in

    def look(self, *given) -> None:
        left.append(sum(os.fstat(file.fileno()).st_blocks > 0 for file in opened.values()))
        leave(self, *given)

    monkeypatch.setattr(freeing.Freeing, "_leave_stand_in", look)
    main(words(source))
    assert left == [6, 5, 4, 3, 2, 1]
    assert not any(os.fstat(file.fileno()).st_blocks for file in opened.values())


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def crash(monkeypatch):
    """End the process at the n-th step that changes the disk for good; nothing is cleaned up."""

    def at(n: int) -> None:
        steps = count()

        def then(does):
            def step(*given, **named):
                if next(steps) == n:
                    raise Crash
                return does(*given, **named)

            return step

        monkeypatch.setattr(freeing.Freeing, "_leave", lambda _: None)
        monkeypatch.setattr(outputs, "_remove", lambda _: None)
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rename")):
            monkeypatch.setattr(owner, name, then(getattr(owner, name)))

    yield at
    monkeypatch.undo()


@pytest.mark.parametrize("n", range(0, 48, 3))
def test_after_a_crash_anywhere_the_same_command_goes_on(n, crash, source, native, monkeypatch):
    crash(n)
    try:
        main(words(source))
        done = True
    except Crash:
        done = False
    monkeypatch.undo()
    left = {p.name for p in (*weights(source), *freed(source.parent / "native.converting"))}
    assert done or len(left) == WEIGHTS
    if not (source.parent / "native").exists():
        main(words(source))
    assert listing(source.parent / "native") == listing(native)
    assert not weights(source)


def test_the_crashes_reach_from_the_first_step_to_the_last(crash, source):
    """That is what the numbers above stand for: the 48th step is not the last by far."""
    crash(10_000)
    seen = []
    monkeypatched = os.fsync
    os.fsync = lambda fd: seen.append(fd) or monkeypatched(fd)
    main(words(source))
    assert 3 * WEIGHTS <= len(seen) <= 48


@pytest.mark.compiles
@pytest.mark.parametrize("after", [0, 1, 4])
def test_kill_9(after, source, native):
    """A process of its own is killed as soon as so many files are freed."""
    folder = source.parent / "native.converting"
    reached = lambda: len(weights(source)) <= WEIGHTS - after and folder.exists()  # noqa: E731
    process = start("-m", "convert", *words(source), cwd=source.parent)
    stop_when(reached, process, signal.SIGKILL, -signal.SIGKILL)
    assert len({p.name for p in (*weights(source), *freed(folder))}) == WEIGHTS
    run("-m", "convert", *words(source), cwd=source.parent)
    assert listing(source.parent / "native") == listing(native)


def interrupted(source: Path, crash, monkeypatch) -> Path:
    crash(30)
    with pytest.raises(Crash):
        main(words(source))
    monkeypatch.undo()
    return source.parent / "native.converting"


def test_stand_ins_take_no_room_and_look_like_nothing_else(source, crash, monkeypatch):
    """They lie where no tool takes them for weights: in the source there are none."""
    sizes = {p.name: p.stat().st_size for p in weights(source)}
    folder = interrupted(source, crash, monkeypatch)
    files = freed(folder)
    assert any("diffusion" in file.name for file in files)
    for file in files:
        assert file.stat().st_size == sizes[file.name] and not (source / file.name).exists()
        assert file.stat().st_blocks * 512 < 400_000 < sizes[SHARD]


def test_another_command_is_refused_in_between(source, crash, monkeypatch):
    interrupted(source, crash, monkeypatch)
    plain = [word for word in words(source) if word != "--delete-source"]
    with pytest.raises(UserError, match="has not ended; run the same command again"):
        main(plain)
    with pytest.raises(UserError, match=r"begun with dtype bfloat16 and not None; run the command"):
        main([word for word in words(source) if word not in ("--dtype", "bfloat16")])


def test_a_full_disk_says_where_the_tensors_are(source, native, monkeypatch, capsys):
    """The disk fills up after some files are freed."""
    written, write = count(), os.pwrite

    def full(fd: int, *rest) -> int:
        if next(written) == 250:  # behind the first file, the VAE's
            raise OSError(28, "No space left on device")
        return write(fd, *rest)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device.*run the same command again"):
        main(words(source))
    assert "converted and deleted, whose tensors are safe in" in capsys.readouterr().err
    monkeypatch.undo()
    main(words(source))
    assert listing(source.parent / "native") == listing(native)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "folder"])
def test_links_are_refused_and_nothing_is_touched(source, kind, tmp_path):
    file = source / SHARD
    elsewhere = tmp_path / "blobs"
    elsewhere.mkdir()
    if kind == "folder":
        weights_of = source
        source = tmp_path / "linked"
        source.symlink_to(weights_of)  # the folder itself may be reached through a link
        main(words(source))
        assert not weights(weights_of)
        return
    if kind == "symlink":
        file.rename(elsewhere / "blob")
        file.symlink_to(elsewhere / "blob")
    else:
        os.link(file, elsewhere / "blob")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"{file.name} is a link, as in a cache of Hugging Face"):
        main(words(source))
    assert listing(tmp_path) == before


def test_a_source_that_is_not_whole_loses_nothing(source, tmp_path):
    (source / "Wan2.1_VAE.pth").unlink()
    before = listing(tmp_path)
    with pytest.raises(UserError, match="has no vae"):
        main(words(source))
    assert listing(tmp_path) == before


def test_only_what_is_converted_is_deleted(source):
    main(words(source, "--only", "vae"))
    assert len(weights(source)) == WEIGHTS - 1 and not (source / "Wan2.1_VAE.pth").exists()


def test_a_single_file_goes_on_though_it_is_gone(tmp_path, crash, monkeypatch):
    source = tmp_path / "dit.safetensors"
    save_file(random_tensors("dit", "official"), source)
    main(["pipeline", str(source), str(tmp_path / "plain")])
    command = ["pipeline", str(source), str(tmp_path / "native"), "--delete-source"]
    monkeypatch.setattr(freeing.Freeing, "finish", lambda *_: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        main(command)
    monkeypatch.undo()
    assert not source.exists()
    main(command)
    assert listing(tmp_path / "native") == listing(tmp_path / "plain")


def test_the_room_that_is_needed_counts_what_is_freed(source, monkeypatch, capsys):
    """The most that there is at once beside the source, and a disk that has a byte less."""
    sizes = [(path.stat().st_size) for path in weights(source)]
    needed: list[int] = []
    monkeypatch.setattr(freeing, "require_space", lambda _, n: needed.append(n))
    main(words(source))
    result = sum(p.stat().st_size for p in (source.parent / "native").glob("*.safetensors"))
    assert 0 < needed[0] < result - min(sizes) // 2
    assert json.loads((source.parent / "native/config.json").read_text())["format"] == "wanjax"
