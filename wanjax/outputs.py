"""Nothing half written: an output is made beside its place under another name, then renamed.

What a killed run leaves behind carries its machine's name and process number, so that the next run
to the same place can tell it from the work of a living one, and remove it.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.filesize import decimal

from wanjax.errors import UserError

LOCK = ".lock"
BESIDE = ".latents.safetensors" + "1234567"  # what names are lengthened by, and a process's number
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to write to; on leaving it becomes `path`, and after an error nothing remains.

    Raises `UserError` where `path` exists (unless `replace`), the disk is full or closed to us.
    """
    if not replace or path.is_dir():
        refuse_existing(path)
    with _beside(path) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill; on leaving it becomes `path`, and after an error nothing remains.

    With `replace`, what was there goes when the new one is whole.
    """
    if not replace:
        refuse_existing(path)
    with _beside(path) as partial:
        partial.mkdir()
        yield partial
        if not replace:
            partial.rename(path)
            return
        path.rename(replaced(path))
        try:
            partial.rename(path)
        except BaseException:
            replaced(path).rename(path)
            raise
        _remove(replaced(path))


def replaced(path: Path) -> Path:
    """Where a folder is for the moment in which another takes its place."""
    return path.with_name(f"{path.name}.replaced")


def put_back(path: Path) -> None:
    """Mend what a kill in that moment left: the folder of before is there again."""
    before = replaced(path)
    if before.exists() and path.exists():
        _remove(before)
    elif before.exists():
        before.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    partial = path.parent / f"{_partial_prefix(path.name)}{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        yield partial
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        _remove(partial)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Refuse a folder in which another living process is `doing` the same. It is made if it is
    missing, and goes again if nothing was put into it.

    The lock goes with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        _lock(file, f"{doing} in {folder}")
        try:
            yield
        finally:
            if os.listdir(folder) == [LOCK]:
                _remove(folder)


def _lock(file: TextIO, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"Another process is {what} ({file.read()}); wait for it, or stop it first."
        ) from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def refuse_existing(path: Path) -> None:
    """Refuse to write over something, before any work."""
    if path.is_symlink() or path.exists():
        raise UserError(f"{path} exists already; remove it, or choose another name.")


def require_writable(path: Path) -> None:
    """Refuse, before any work, a place where `path` could not be made."""
    place = next(p for p in path.absolute().parents if p.exists())
    longest = os.pathconf(place, "PC_NAME_MAX") - len(_partial_prefix("")) - len(BESIDE)
    if len(os.fsencode(path.name)) > longest:
        raise UserError(f"{path.name[:40]}... is too long a name; use {longest} bytes at most.")
    if not place.is_dir():
        raise UserError(f"{path} cannot be made, as {place} is a file; choose another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be made, as {place} may not be written to; choose another place."
        )


def free_space(path: Path) -> str:
    """What can be said of the disk that holds `path`, whether or not that exists yet."""
    disk = shutil.disk_usage(_standing(path))
    return f"its disk has {decimal(disk.free)} free" if disk.total else "its disk tells no size"


def _standing(path: Path) -> Path:
    """`path`, or what there is of the way to it."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def require_space(path: Path, needed: int) -> None:
    """Refuse, before any work, what the disk that holds `path` has no room for (in bytes)."""
    disk = shutil.disk_usage(_standing(path))
    # Some network file systems report a size of zero: nothing can be told from that.
    if disk.total and disk.free < needed:
        raise UserError(
            f"{path} needs {decimal(needed)} and its disk has {decimal(disk.free)} free; "
            "make room, or choose a place on another disk."
        )


def _partial_prefix(name: str) -> str:
    """What is half made begins so, with the number of its process behind."""
    return f"{name}.partial-{socket.gethostname()}-"


def _explained(error: OSError, path: Path) -> UserError:
    if error.errno in _FULL:
        reason = "the disk is full" if error.errno != errno.EFBIG else "the file grew too large"
        return UserError(
            f"{path} could not be written, {reason}, and nothing of it was kept; "
            "make room, or choose a place on another disk."
        )
    return UserError(
        f"{path} could not be written ({error.strerror or error}); "
        "choose a place where you may create files."
    )


def _remove_stale(path: Path) -> None:
    prefix = _partial_prefix(path.name)
    for other in path.parent.iterdir():
        pid = other.name.removeprefix(prefix)
        if other.name.startswith(prefix) and pid.isdigit() and not _alive(int(pid)):
            _remove(other)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    with suppress(OSError):  # an error of the work itself is more worth saying
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
